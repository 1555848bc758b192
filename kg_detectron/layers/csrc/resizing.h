// Bilinear resizing of crops (paper, figure 1b), the same on both devices: where a pixel comes from, and the checks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "host_device.h"

namespace kg {

// Where a place of a resized line comes from: two places of the line before, and their weights (align_corners False).
template <typename T>
struct Source {
    int64_t low, high;
    T weights[2];

    KG_HOST_DEVICE Source(int64_t place, int64_t before, int64_t after) {
        const T scale = static_cast<T>(before) / static_cast<T>(after), last = static_cast<T>(before - 1);
        const T center = (static_cast<T>(place) + T(0.5)) * scale - T(0.5);
        const T position = center < 0 ? T(0) : center > last ? last : center;
        low = static_cast<int64_t>(position);
        high = low + 1 < before ? low + 1 : before - 1;
        weights[1] = position - static_cast<T>(low);
        weights[0] = 1 - weights[1];
    }

    // What the place of the line before contributes.
    KG_HOST_DEVICE T weight(int64_t place) const {
        return (low == place ? weights[0] : T(0)) + (high == place ? weights[1] : T(0));
    }
};

// The places of the resized line, from first to last, that may come from a place of the line before.
struct Destinations {
    int64_t first, last;

    KG_HOST_DEVICE Destinations(int64_t place, int64_t before, int64_t after) {
        const double scale = static_cast<double>(after) / static_cast<double>(before);
        // One place more on both sides: the ends are rounded. The outermost places take what lies beyond them.
        const double low = floor((static_cast<double>(place) - 0.5) * scale - 0.5) - 1;
        const double high = ceil((static_cast<double>(place) + 1.5) * scale - 0.5) + 1;
        first = place == 0 || low < 0 ? 0 : static_cast<int64_t>(low);
        last = place == before - 1 || high > static_cast<double>(after - 1) ? after - 1 : static_cast<int64_t>(high);
    }
};

// The tables of all crops, and where each crop begins among the products. `check_crops` makes them.
struct Crops {
    at::Tensor before, after, places;  // [R,2] int64
    std::vector<int64_t> first;
    int64_t resized = 0;  // pixels of all crops in the result
};

// All crops lie within the products and the result, whatever the tables say.
inline Crops check_crops(int64_t products, const at::Tensor& before, const at::Tensor& after, const at::Tensor& places,
                         int64_t pixels) {
    TORCH_CHECK_VALUE(products >= 0 && pixels >= 0, "products and pixels: expected no negative ones, got ", products,
                      " and ", pixels);
    const int64_t crops = before.dim() > 0 ? before.size(0) : 0;
    for (const at::Tensor* table : {&before, &after, &places}) {
        TORCH_CHECK_VALUE(table->dim() == 2 && table->size(0) == crops && table->size(1) == 2 &&
                              table->scalar_type() == at::kLong && table->device().is_cpu(),
                          "before, after and places: expected int64 (R,2) on the CPU, got ", before.sizes(), ", ",
                          after.sizes(), " and ", places.sizes());
    }
    Crops checked{before.contiguous(), after.contiguous(), places.contiguous(), {}};
    const auto *from = checked.before.const_data_ptr<int64_t>(), *to = checked.after.const_data_ptr<int64_t>(),
               *place = checked.places.const_data_ptr<int64_t>();
    int64_t used = 0;
    for (int64_t r = 0; r < crops; ++r, from += 2, to += 2, place += 2) {
        for (int side = 0; side < 2; ++side) {
            TORCH_CHECK_VALUE(from[side] > 0 && from[side] <= products && to[side] > 0 && to[side] <= pixels,
                              "before and after: expected sides from 1 to ", products, " and ", pixels, ", got ",
                              from[side], " and ", to[side]);
        }
        TORCH_CHECK_VALUE(place[0] >= 0 && place[0] < pixels && place[1] >= to[1] && place[1] <= pixels,
                          "places: expected crops within ", pixels, " pixels, got ", place[0], " with ", place[1],
                          " pixels a row");
        const int64_t last = place[0] + (to[0] - 1) * place[1] + to[1] - 1;
        TORCH_CHECK_VALUE(last < pixels, "places: expected crops within ", pixels, " pixels, got ", place[0], " with ",
                          place[1], " pixels a row for ", to[0], " x ", to[1]);
        checked.first.push_back(used);
        checked.resized += to[0] * to[1];
        used += from[0] * from[1];
        TORCH_CHECK_VALUE(used <= products, "products: expected ", used, " pixels or more, got ", products);
    }
    TORCH_CHECK_VALUE(used == products, "products: expected ", used, " pixels, got ", products);
    return checked;
}

// For `convolve_resized`.
inline void check_products(const at::Tensor& products) {
    TORCH_CHECK_VALUE(products.dim() == 3 && products.size(1) == 9 && products.is_floating_point(),
                      "products: expected a floating-point tensor (P,9,C), got ", products.scalar_type(), " of shape ",
                      products.sizes());
}

// For its gradient.
inline void check_gradient(const at::Tensor& gradient) {
    TORCH_CHECK_VALUE(gradient.dim() == 2 && gradient.is_floating_point(),
                      "gradient: expected a floating-point tensor (pixels,C), got ", gradient.scalar_type(),
                      " of shape ", gradient.sizes());
}

}  // namespace kg
