// The keypoint graph (kg_detectron/graph.py), and arithmetic that must give the same result on every device.
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>

#include "host_device.h"

namespace kg {

// Keypoint k: tl, tr, bl, br, centre.
constexpr int kKeypoints = 5;
constexpr int kCentre = 4;

// The directed edges, in the order of the group offset channels: those of edge e are 2e (x) and 2e + 1 (y).
struct Edges {
    int8_t index[kKeypoints][kKeypoints];  // of edge k -> l; -1: there is no such edge
    int count;

    // edges: k and l of each edge, one after another, checked by `check_edges`.
    explicit Edges(c10::IntArrayRef edges) : count(static_cast<int>(edges.size() / 2)) {
        for (auto& row : index) {
            for (int8_t& edge : row) {
                edge = -1;
            }
        }
        for (int edge = 0; edge < count; ++edge) {
            index[edges[2 * edge]][edges[2 * edge + 1]] = static_cast<int8_t>(edge);
        }
    }
};

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
