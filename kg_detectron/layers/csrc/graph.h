// The keypoint graph (kg_detectron/graph.py), and arithmetic that must come out the same on every device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KG_HOST_DEVICE __host__ __device__ inline
#else
#define KG_HOST_DEVICE inline
#endif

namespace kg {

// Keypoint k: tl, tr, bl, br, centre.
constexpr int kKeypoints = 5;
constexpr int kCentre = 4;
constexpr int kEdges = kKeypoints * (kKeypoints - 1);

// Index of the directed edge k -> l: (0,1) (0,2) .. (3,4), then the same reversed.
KG_HOST_DEVICE int edge_index(int k, int l) {
    const int low = k < l ? k : l, high = k < l ? l : k;
    const int edge = low * (2 * kKeypoints - 1 - low) / 2 + high - low - 1;
    return k < l ? edge : edge + kEdges / 2;
}

// Place of keypoint l among those other than k: in the displacements of a peak.
KG_HOST_DEVICE int other_index(int k, int l) {
    return l < k ? l : l - 1;
}

// x^2 + y^2 with every step rounded. A compiler that fuses a multiplication and an addition rounds once less, and two
// equal distances differ; on the host -ffp-contract=off forbids it.
KG_HOST_DEVICE double squared_norm(double x, double y) {
#ifdef __CUDA_ARCH__
    return __dadd_rn(__dmul_rn(x, x), __dmul_rn(y, y));
#else
    return x * x + y * y;
#endif
}

KG_HOST_DEVICE float squared_norm(float x, float y) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(__fmul_rn(x, x), __fmul_rn(y, y));
#else
    return x * x + y * y;
#endif
}

}  // namespace kg
