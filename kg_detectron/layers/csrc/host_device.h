// Marks functions that are compiled for the host and, in CUDA sources, for the device too.
#pragma once

// Always inlined: what a function compiled for several instruction sets (cpu/vectorize.h) calls must become part of it.
#if defined(__GNUC__)
#define KG_INLINE __attribute__((always_inline)) inline
#else
#define KG_INLINE inline
#endif

#ifdef __CUDACC__
#define KG_HOST_DEVICE __host__ __device__ inline
#else
#define KG_HOST_DEVICE KG_INLINE
#endif
