// Target rendering (paper, equations 1 and 3): what a box gives, and the pixels of a disc, the same on both devices.
#pragma once

#include <cmath>
#include <cstdint>

#include "graph.h"

namespace kg {

// Keypoints of a box at one scale, pixel indices; `target` is false where the box is too small for the scale.
struct TargetCell {
    float x[kKeypoints], y[kKeypoints];
    bool target;

    // box: x1, y1, x2, y2, continuous input pixels; min_side: last minus first pixel of the scale.
    KG_HOST_DEVICE TargetCell(const float* box, float stride, float min_side) {
        target = (box[2] - box[0] - 1) / stride > min_side && (box[3] - box[1] - 1) / stride > min_side;
        const float x1 = box[0], y1 = box[1], x2 = box[2] - 1, y2 = box[3] - 1;
        for (int k = 0; k < kKeypoints; ++k) {
            const float at_x = k == kCentre ? (x1 + x2) / 2 : k % 2 ? x2 : x1;
            const float at_y = k == kCentre ? (y1 + y2) / 2 : k / 2 ? y2 : y1;
            x[k] = (at_x + 0.5f) / stride - 0.5f;
            y[k] = (at_y + 0.5f) / stride - 0.5f;
        }
    }
};

// Pixels from first to last, both included, that a disc around `at` may hold on an axis of `size` pixels.
KG_HOST_DEVICE void disc_span(float at, double radius, int64_t size, int64_t* first, int64_t* last) {
    const double low = fmax(floor(static_cast<double>(at)) - ceil(radius), 0.0);
    const double high = fmin(floor(static_cast<double>(at)) + ceil(radius) + 1, static_cast<double>(size - 1));
    *first = static_cast<int64_t>(fmin(low, static_cast<double>(size)));
    *last = static_cast<int64_t>(fmax(high, -1.0));
}

}  // namespace kg
