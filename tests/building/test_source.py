"""What a source's hash is made of."""

from __future__ import annotations

from jagtile.generator.render import Source, code_of

TEXT = """// A kernel.
#include "a.cuh"
/* several
   lines */
int one = 1;  // what it is
const char* address = "https://none";  // "quoted
  int two = 2;

"""
CODE = '#include "a.cuh"\nint one = 1;\nconst char* address = "https://none";\nint two = 2;'


def test_code_has_no_comments_and_no_layout_but_strings_as_they_are() -> None:
    assert code_of(TEXT) == CODE
    assert code_of(CODE) == CODE
    assert code_of(r'asm("a \"//\" b"); // c') == r'asm("a \"//\" b");'


def test_comments_do_not_change_the_hash_and_code_does_in_headers_too() -> None:
    source = Source(TEXT, ".cu", (("a.cuh", "int a;  // a\n"),))
    assert source.sha256 == Source(CODE, ".cu", (("a.cuh", "// an a\nint a;\n"),)).sha256
    others = (
        Source(TEXT.replace("one = 1", "one = 11"), ".cu", source.headers),
        Source(TEXT.replace("//none", "//nobody"), ".cu", source.headers),
        Source(TEXT, ".cu", (("a.cuh", "int b;"),)),
        Source(TEXT, ".cu", (("b.cuh", "int a;"),)),
        Source(TEXT, ".cu", ()),
    )
    assert len({source.sha256, *(other.sha256 for other in others)}) == 6
