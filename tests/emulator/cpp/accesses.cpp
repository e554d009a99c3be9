// Every load and store of the kernel that the compiler could not keep in registers: g++'s hooks for an address
// sanitizer, in which nothing of that sanitizer is used.
#include "machine.h"

extern "C" {
extern char __ehdr_start, _end;  // this shared object
}

namespace emu {

namespace {

inline void access(const void* pointer, uint64_t bytes, bool write, void* place) {
  if (self == nullptr) return;
  Fiber& fiber = current();
  const char* address = static_cast<const char*>(pointer);
  if (static_cast<uint64_t>(address - fiber.stack) < kStackBytes) return;
  const uint64_t offset = static_cast<uint64_t>(address - fiber.cta->shared);
  if (offset < kWindowBytes) {
    fiber.caller = place;
    const uint32_t smem = static_cast<uint32_t>(offset), size = static_cast<uint32_t>(bytes);
    window(*fiber.cta, smem, size);
    generic_access(*fiber.warp, smem, size, write, place);
    if (fiber.cta->cluster->has_peers()) {
      global_access(*fiber.warp, pointer, bytes, write ? Access::kWrite : Access::kRead, place);
    }
    if (write) mark_written(fiber, smem, size);
    return;
  }
  if (address >= &__ehdr_start && address < &_end) return;
  if (address >= reinterpret_cast<char*>(&fiber) && address < reinterpret_cast<char*>(&fiber + 1)) return;
  fiber.caller = place;
  if (Cta* peer = peer_with(*fiber.cta, pointer)) {
    window(*peer, static_cast<uint32_t>(address - peer->shared), static_cast<uint32_t>(bytes));
  } else {
    check_global(pointer, bytes, write);
  }
  global_access(*fiber.warp, pointer, bytes, write ? Access::kWrite : Access::kRead, place);
}

}  // namespace

void raw_copy(void* to, const void* from, unsigned bytes) {
  if (self != nullptr) current().caller = __builtin_return_address(0);
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  for (unsigned i = 0; i < bytes; ++i) target[i] = source[i];
}

}  // namespace emu

#define EMU_HOOKS(bytes)                                                                                               \
  extern "C" void __asan_load##bytes##_noabort(void* p) { emu::access(p, bytes, false, __builtin_return_address(0)); } \
  extern "C" void __asan_store##bytes##_noabort(void* p) { emu::access(p, bytes, true, __builtin_return_address(0)); }
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
extern "C" void __asan_loadN_noabort(void* p, unsigned long bytes) {
  emu::access(p, bytes, false, __builtin_return_address(0));
}
extern "C" void __asan_storeN_noabort(void* p, unsigned long bytes) {
  emu::access(p, bytes, true, __builtin_return_address(0));
}
extern "C" void __asan_handle_no_return() {}
