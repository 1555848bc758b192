// Retrieval (paper, section 2.1, step 3): the box of one keypoint graph, written once for both devices.
#pragma once

#include <cmath>

#include "graph.h"

namespace kg {

// Numbers of one graph: x, y and score of each keypoint.
constexpr int kGraphValues = 3 * kKeypoints;

// The outermost present one of two corners along an axis; outer is the sign of outwards.
template <typename T>
struct Side {
    T value;
    bool there = false;

    // graph [5,3]: x, y, score of each keypoint.
    KG_HOST_DEVICE Side(const T* graph, int axis, int first, int second, float outer) : value(0) {
        for (int corner : {first, second}) {
            const T coordinate = graph[3 * corner + axis];
            if (graph[3 * corner + 2] > T(0)) {
                // A coordinate that is not a number stays one, as in the reference.
                if (!there || coordinate != coordinate || (outer > 0 ? coordinate > value : coordinate < value)) {
                    value = value != value ? value : coordinate;
                }
                there = true;
            }
        }
    }
};

// Box (x1, y1, x2, y2) and score of a graph [5,3]; false where the graph gives none. Acc: in which scores are summed.
template <typename T, typename Acc>
KG_HOST_DEVICE bool retrieve_box(const T* graph, bool corner_and_centre, T* box, T* score) {
    int present = 0, corners = 0;
    Acc total = 0;
    for (int k = 0; k < kKeypoints; ++k) {
        const T keypoint_score = graph[3 * k + 2];
        if (keypoint_score > T(0)) {
            total += static_cast<Acc>(keypoint_score);
            ++present;
            corners += k != kCentre;
        }
    }
    const bool centre = graph[3 * kCentre + 2] > T(0);
    // Corners on the low and on the high side of each axis: x, then y.
    const int low[2] = {2, 1}, high[2] = {1, 2};
    for (int axis = 0; axis < 2; ++axis) {
        const Side<T> first(graph, axis, 0, low[axis], -1), last(graph, axis, high[axis], 3, 1);
        if (!(first.there && last.there) && !(centre && (first.there || last.there))) {
            return false;
        }
        const T twice = T(2) * graph[3 * kCentre + axis];
        box[axis] = first.there ? first.value : T(twice - last.value);
        box[axis + 2] = last.there ? last.value : T(twice - first.value);
    }
    *score = T(total) / T(present);
    return corners >= (corner_and_centre ? 1 : 2);
}

}  // namespace kg
