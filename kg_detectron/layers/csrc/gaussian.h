// Weights of the truncated Gaussian, shared by both devices.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace kg {

// Weight at distance 0 .. int(4 sigma + 0.5), so that the kernel of both sides sums to 1.
inline std::vector<double> gaussian_weights(double sigma) {
    const int64_t reach = static_cast<int64_t>(4 * sigma + 0.5);
    std::vector<double> weights(reach + 1);
    double total = 0;
    for (int64_t i = 0; i <= reach; ++i) {
        weights[i] = std::exp(-0.5 * (i / sigma) * (i / sigma));
        total += i ? 2 * weights[i] : weights[i];
    }
    for (double& weight : weights) {
        weight /= total;
    }
    return weights;
}

}  // namespace kg
