// Smoothing of the votes: the truncated Gaussian and the border, the same on both devices.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "host_device.h"

namespace kg {

// Weight at distance 0 .. int(4 sigma + 0.5), so that the kernel of both sides sums to 1. A sigma of 0 smooths nothing.
inline std::vector<double> gaussian_weights(double sigma) {
    const int64_t reach = static_cast<int64_t>(4 * sigma + 0.5);
    std::vector<double> weights(reach + 1, 1);
    double total = 1;
    for (int64_t i = 1; i <= reach; ++i) {
        weights[i] = std::exp(-0.5 * (i / sigma) * (i / sigma));
        total += 2 * weights[i];
    }
    for (double& weight : weights) {
        weight /= total;
    }
    return weights;
}

// Half-sample symmetric continuation (scipy's border `reflect`), for any distance from the border.
KG_HOST_DEVICE int64_t reflect(int64_t index, int64_t size) {
    if (index < 0 || index >= size) {
        index = (index % (2 * size) + 2 * size) % (2 * size);
        index = index < size ? index : 2 * size - 1 - index;
    }
    return index;
}

}  // namespace kg
