// The group offsets at a peak, of maps in any layout, the same on both devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>

#include "checks.h"
#include "graph.h"

namespace kg {

// Group offsets of all scales.
template <typename T>
struct Scales {
    // The channels of one pixel; no data where there is no such pixel.
    struct Pixel {
        const T* data;
        int64_t channel;  // stride

        // x of an edge; its y lies one channel further.
        KG_HOST_DEVICE const T* offset(int edge) const { return data + 2 * edge * channel; }
    };

    int64_t images, count;
    const T* data[kMostScales];
    int64_t sizes[kMostScales][2], strides[kMostScales][4];
    Edges edges;

    Scales(at::TensorList maps, at::IntArrayRef edges)
        : images(maps[0].size(0)), count(static_cast<int64_t>(maps.size())), edges(edges) {
        for (int64_t s = 0; s < count; ++s) {
            data[s] = maps[s].const_data_ptr<T>();
            for (int d = 0; d < 4; ++d) {
                strides[s][d] = maps[s].stride(d);
            }
            for (int d = 0; d < 2; ++d) {
                sizes[s][d] = maps[s].size(d + 2);
            }
        }
    }

    // peak: image + images * scale, keypoint, y, x.
    KG_HOST_DEVICE Pixel at(const int64_t* peak) const {
        const int64_t group = peak[0], k = peak[1], y = peak[2], x = peak[3];
        if (group < 0 || group >= images * count || k < 0 || k >= kKeypoints) {
            return {nullptr, 0};
        }
        const int64_t s = group / images, image = group % images;
        if (y < 0 || y >= sizes[s][0] || x < 0 || x >= sizes[s][1]) {
            return {nullptr, 0};
        }
        return {data[s] + image * strides[s][0] + y * strides[s][2] + x * strides[s][3], strides[s][1]};
    }

    // out [4,2]: x, y towards every other keypoint; not numbers where there is no such pixel or edge.
    KG_HOST_DEVICE void gather(const int64_t* peak, T* out) const {
        const Pixel pixel = at(peak);
        const int k = static_cast<int>(peak[1]);
        for (int i = 0; i < kKeypoints - 1; ++i) {
            const int edge = pixel.data ? edges.index[k][i < k ? i : i + 1] : -1;
            out[2 * i] = edge < 0 ? static_cast<T>(NAN) : pixel.offset(edge)[0];
            out[2 * i + 1] = edge < 0 ? static_cast<T>(NAN) : pixel.offset(edge)[pixel.channel];
        }
    }
};

}  // namespace kg
