// Functions with KG_VECTORIZE are compiled for several instruction sets, and the processor's own is chosen when the
// library is loaded: wheels are built for the oldest one. The body that such functions share is KG_INLINE.
#pragma once

#include "../host_device.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
// Unroll-and-jam makes GCC 12 leave the inner loop of the Gaussian scalar.
#define KG_VECTORIZE __attribute__((target_clones("default", "avx2", "avx512f"), optimize("no-loop-unroll-and-jam")))
#else
#define KG_VECTORIZE
#endif
