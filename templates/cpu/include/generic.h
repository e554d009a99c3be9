// Any CPU: 16-byte vectors, no instruction of any set by name.
#pragma once

constexpr int kVectorBytes = 16;

#include "cpu/include/exp2.h"
#include "cpu/include/half.h"

// The lower halves of a times b.
static inline LongVec multiply_words(LongVec a, uint32_t b) { return (a & 0xffffffff) * b; }
