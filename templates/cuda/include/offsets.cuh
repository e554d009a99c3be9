// Reading cu_seqlens: the offsets of a packed tensor's sequences, int32 or int64.
#pragma once

// The lower half of one of 64 bits.
__device__ __forceinline__ int offset_at(const void* offsets, int index, int wide) {
  return static_cast<const int*>(offsets)[static_cast<long long>(index) << (wide != 0)];
}

// The first of the offsets low to high - 1 that is greater than `row`, else `high`. One thread.
__device__ __forceinline__ int offset_beyond(const void* offsets, int wide, int low, int high, int row) {
  while (low < high) {
    const int middle = (low + high) >> 1;
    if (offset_at(offsets, middle, wide) > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The same by a whole warp, 32 offsets a step: four steps for a million.
__device__ __forceinline__ int warp_offset_beyond(const void* offsets, int wide, int low, int high, int row) {
  const int lane = threadIdx.x % 32;
  while (low < high) {
    const int step = (high - low + 31) / 32;
    const int probe = min(low + (lane + 1) * step, high) - 1;
    const unsigned beyond = __ballot_sync(0xffffffff, offset_at(offsets, probe, wide) > row);
    const int within = beyond ? __ffs(beyond) - 1 : 32;  // lanes whose probes are not beyond
    const int begin = low;
    low = min(begin + within * step, high);
    if (within < 32) high = min(begin + (within + 1) * step, high) - 1;
  }
  return low;
}
