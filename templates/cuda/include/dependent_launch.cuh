// Kernels of one call that are launched while the one before still runs (programmatic dependent launch, docs/launch.md). One
// with an entry `dependent` in its launch facts calls await_previous_kernels in every thread.
#pragma once

// The next kernel may be launched as soon as every CTA of this one has come here or ended.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

// Until the kernel before has ended, and what it wrote is seen. Before a thread touches global memory, and in every thread: so
// a kernel that has ended stands for all before it, and what comes behind need not know how far these are.
__device__ __forceinline__ void await_previous_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
