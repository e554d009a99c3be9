// What a translated kernel sees of the emulated machine: its own identity, and the operations that need a runtime.
#pragma once
#include <cstdint>

namespace emu {

struct Dim3 {
  unsigned x, y, z;
};

struct Thread {
  Dim3 thread, block;
  const char* at;  // the PTX instruction that is being carried out
};

extern Thread* self;
extern Dim3 grid, block;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- address spaces: shared addresses are 32-bit, dynamic shared memory begins at 1024 ------------------------------
// A kernel's have the CTA's rank in its cluster in their upper bits (clusters.cpp); here they are offsets without it.
constexpr uint32_t kSharedBegin = 1024;
uint32_t shared_address(const void* pointer);
void* shared_pointer(uint32_t address, uint32_t bytes);
void* dynamic_shared();
void* static_shared(int id, uint32_t bytes, uint32_t alignment);
void raw_copy(void* to, const void* from, unsigned bytes);  // of an atomic operation: no race, no bounds
enum class Strong { kLoad, kStore, kAdd, kExchange };       // the last: an atomic that gives back what was there
void strong_access(const void* pointer, unsigned bytes, Strong kind, bool releases);
void global_fence();
void release_flag(uint32_t address);
void acquire_flag(uint32_t address);
void check_global(const void* pointer, uint64_t bytes, bool write);

// ---- scheduling -----------------------------------------------------------------------------------------------------
void preempt();  // another thread may run now
void poll();     // the caller looks at memory that another thread will write, perhaps in a loop
void progress();
void await_launches();  // griddepcontrol.wait

// ---- warps and barriers ---------------------------------------------------------------------------------------------
uint32_t shuffle(uint32_t mask, uint32_t value, int mode, int operand, int width);  // modes: idx, up, down, xor
uint32_t ballot(uint32_t mask, bool value);
uint32_t match_any(uint32_t mask, uint64_t value);
void sync_warp(uint32_t mask);
bool elect(uint32_t mask, uint32_t& leader);
void set_registers(int count, bool grow);

void cluster_arrive(bool releases);
void cluster_wait();
uint32_t cluster_rank();
void* pointer_in_cluster(const void* pointer, uint32_t rank);  // of shared memory, the same variable of another CTA
uint32_t address_in_cluster(uint32_t address, uint32_t rank);  // with the rank, of an address with any
uint32_t own_offset(uint32_t address);                         // without the rank, which must be the CTA's own

enum class Reduce { kNone, kOr, kAnd, kPopc };
constexpr int kAllThreads = -1;
uint32_t barrier(int id, int threads, bool aligned, bool wait, Reduce reduce, bool value);

// ---- mbarriers ------------------------------------------------------------------------------------------------------
void mbarrier_init(uint32_t address, uint32_t arrivals);
void mbarrier_invalidate(uint32_t address);
uint64_t mbarrier_arrive(uint32_t address, uint32_t count, uint32_t expected_bytes);  // here or in another CTA
void mbarrier_expect(uint32_t address, uint32_t bytes);
bool mbarrier_wait(uint32_t address, bool parity, bool may_block);
void mbarrier_init_fence();

// ---- asynchronous copies --------------------------------------------------------------------------------------------
enum class Combine { kNone, kAddF32, kAddBf16, kAddF16 };
Combine tensor_addition(const void* map);  // by the map's element type
void tensor_prefetch(const void* map);
void tensor_prefetch_box(const void* map, int rank, const int* coordinates);
void tensor_load(uint32_t smem, const void* map, uint32_t barrier, int rank, const int* coordinates, uint32_t ctas);
void tensor_store(const void* map, uint32_t smem, int rank, const int* coordinates, Combine combine);
void bulk_load(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier);
void bulk_store(void* global, uint32_t smem, uint32_t bytes, Combine combine);
void bulk_commit();
void bulk_wait(int pending, bool read_only);
void async_copy(uint32_t smem, const void* global, uint32_t bytes, uint32_t source_bytes);  // cp.async
void async_commit();
void async_wait(int pending);
void async_arrive(uint32_t barrier, bool counted);
void proxy_fence();

// ---- matrices -------------------------------------------------------------------------------------------------------
void load_matrix(uint32_t smem, int count, bool transpose, uint32_t* const* registers);
void store_matrix(uint32_t smem, int count, bool transpose, const uint32_t* registers);
void transpose_matrix(uint32_t& to, uint32_t from);
void mma_m16n8k16(float* const* d, const uint32_t* a, const uint32_t* b, const float* c, bool bf16);

struct RegisterA {  // `live` is read when the product is carried out; null: `value` was given
  const uint32_t* live;
  uint32_t value;
};
struct Wgmma {
  int n;
  bool bf16;
  bool a_in_registers;
  bool accumulate;
  int scale_a, scale_b;
  int transpose_a, transpose_b;
  uint64_t a, b;
};
void wgmma(const Wgmma& operation, float* const* d, const RegisterA* a);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace emu
