#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../resizing.h"
#include "tasks.h"
#include "vectorize.h"

namespace kg {
namespace {

// Of every place of a resized line.
template <typename T>
std::vector<Source<T>> sources(int64_t before, int64_t after) {
    std::vector<Source<T>> line;
    line.reserve(after);
    for (int64_t i = 0; i < after; ++i) {
        line.emplace_back(i, before, after);
    }
    return line;
}

// Three taps of two pixels each. A tap outside the crop has weight 0, and any line.
template <typename T, typename Pointer>
struct Terms {
    T weights[6];
    Pointer lines[6];
};

// out[i] = sum of weights[t] * lines[t][i], in one plain loop, which compilers vectorise.
template <typename T>
KG_INLINE void blend(const Terms<T, const T*>& terms, int64_t length, T* __restrict out) {
    const T *a = terms.lines[0], *b = terms.lines[1], *c = terms.lines[2], *d = terms.lines[3], *e = terms.lines[4],
            *f = terms.lines[5];
    const T u = terms.weights[0], v = terms.weights[1], w = terms.weights[2], x = terms.weights[3],
            y = terms.weights[4], z = terms.weights[5];
    for (int64_t i = 0; i < length; ++i) {
        out[i] = (u * a[i] + v * b[i]) + (w * c[i] + x * d[i]) + (y * e[i] + z * f[i]);
    }
}

// The reverse: lines[t][i] += weights[t] * in[i]
template <typename T>
KG_INLINE void spread(const Terms<T, T*>& terms, int64_t length, const T* __restrict in) {
    for (int t = 0; t < 6; ++t) {
        T* __restrict line = terms.lines[t];
        const T weight = terms.weights[t];
        for (int64_t i = 0; i < length; ++i) {
            line[i] += weight * in[i];
        }
    }
}

// The terms of place i of a resized line; lines(place, tap): where those of a place before resizing begin.
template <typename T, typename Lines>
KG_INLINE auto terms_at(const std::vector<Source<T>>& places, int64_t i, const Lines& lines) {
    Terms<T, decltype(lines(0, 0))> terms;
    const int64_t last = static_cast<int64_t>(places.size()) - 1;
    for (int64_t tap = 0; tap < 3; ++tap) {
        const int64_t at = i + tap - 1;
        const Source<T>& from = places[std::min(std::max<int64_t>(at, 0), last)];
        const T inside = at >= 0 && at <= last;
        terms.weights[2 * tap] = inside * from.weights[0];
        terms.weights[2 * tap + 1] = inside * from.weights[1];
        terms.lines[2 * tap] = lines(from.low, tap);
        terms.lines[2 * tap + 1] = lines(from.high, tap);
    }
    return terms;
}

// One crop, its products [h,w,3,3,C] and its place in the result [H,W,C], whose rows lie `stride` pixels apart. A line
// is what the products of all rows give for one row of the result: [w,3,C].
template <typename T>
struct Crop {
    std::vector<Source<T>> rows, columns;
    int64_t width, channels;

    Crop(const int64_t* before, const int64_t* after, int64_t channels)
        : rows(sources<T>(before[0], after[0])),
          columns(sources<T>(before[1], after[1])),
          width(before[1]),
          channels(channels) {}

    int64_t line_length() const { return width * 3 * channels; }

    // Of row y of the result, at column x of the products.
    template <typename Pointer>
    KG_INLINE auto vertical(Pointer products, int64_t y, int64_t x) const {
        return terms_at(
            rows, y, [&](int64_t row, int64_t tap) { return products + ((row * width + x) * 3 + tap) * 3 * channels; });
    }

    // Of column x of the result.
    template <typename Pointer>
    KG_INLINE auto horizontal(Pointer line, int64_t x) const {
        return terms_at(columns, x, [&](int64_t column, int64_t tap) { return line + (column * 3 + tap) * channels; });
    }

    KG_INLINE void convolve(const T* products, T* out, int64_t stride, T* line) const {
        for (size_t y = 0; y < rows.size(); ++y) {
            for (int64_t x = 0; x < width; ++x) {
                blend<T>(vertical(products, y, x), 3 * channels, line + x * 3 * channels);
            }
            for (size_t x = 0; x < columns.size(); ++x) {
                blend<T>(horizontal<const T*>(line, x), channels, out + (y * stride + x) * channels);
            }
        }
    }

    KG_INLINE void propagate(T* products, const T* out, int64_t stride, T* line) const {
        for (size_t y = 0; y < rows.size(); ++y) {
            std::fill_n(line, line_length(), T(0));
            for (size_t x = 0; x < columns.size(); ++x) {
                spread<T>(horizontal(line, x), channels, out + (y * stride + x) * channels);
            }
            for (int64_t x = 0; x < width; ++x) {
                spread<T>(vertical(products, y, x), 3 * channels, line + x * 3 * channels);
            }
        }
    }
};

KG_VECTORIZE void convolve(const Crop<float>& crop, const float* products, float* out, int64_t stride, float* line) {
    crop.convolve(products, out, stride, line);
}

KG_VECTORIZE void convolve(const Crop<double>& crop, const double* products, double* out, int64_t stride,
                           double* line) {
    crop.convolve(products, out, stride, line);
}

KG_VECTORIZE void propagate(const Crop<float>& crop, float* products, const float* out, int64_t stride, float* line) {
    crop.propagate(products, out, stride, line);
}

KG_VECTORIZE void propagate(const Crop<double>& crop, double* products, const double* out, int64_t stride,
                            double* line) {
    crop.propagate(products, out, stride, line);
}

// Calls run(crop, its products, its place in the result, pixels from row to row there, a line to work in) for each
// crop, larger ones first: the last thread to finish should have little left to do.
template <typename T, typename Products, typename Resized, typename Run>
void each_crop(const Crops& crops, int64_t channels, Products products, Resized resized, const Run& run) {
    const auto *from = crops.before.const_data_ptr<int64_t>(), *to = crops.after.const_data_ptr<int64_t>(),
               *place = crops.places.const_data_ptr<int64_t>();
    std::vector<int64_t> order(crops.first.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return to[2 * a] * to[2 * a + 1] > to[2 * b] * to[2 * b + 1]; });
    each_task(static_cast<int64_t>(order.size()), [&](int64_t task) {
        const int64_t r = order[task];
        const Crop<T> crop(from + 2 * r, to + 2 * r, channels);
        std::vector<T> line(crop.line_length());
        run(crop, products + crops.first[r] * 9 * channels, resized + place[2 * r] * channels, place[2 * r + 1],
            line.data());
    });
}

at::Tensor convolve_resized(const at::Tensor& products, const at::Tensor& before, const at::Tensor& after,
                            const at::Tensor& places, int64_t pixels) {
    check_products(products);
    const Crops crops = check_crops(products.size(0), before, after, places, pixels);
    const at::Tensor in = products.to(c10::promoteTypes(products.scalar_type(), at::kFloat)).contiguous();
    const int64_t channels = in.size(2);
    const bool full = crops.resized == pixels;
    at::Tensor out = full ? at::empty({pixels, channels}, in.options()) : at::zeros({pixels, channels}, in.options());
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "convolve_resized", [&] {
        each_crop<scalar_t>(crops, channels, in.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>(),
                            [](auto&&... crop) { convolve(crop...); });
    });
    return out.to(products.scalar_type());
}

at::Tensor convolve_resized_backward(const at::Tensor& gradient, int64_t products, const at::Tensor& before,
                                     const at::Tensor& after, const at::Tensor& places) {
    check_gradient(gradient);
    const Crops crops = check_crops(products, before, after, places, gradient.size(0));
    const at::Tensor in = gradient.to(c10::promoteTypes(gradient.scalar_type(), at::kFloat)).contiguous();
    const int64_t channels = in.size(1);
    at::Tensor out = at::zeros({products, 9, channels}, in.options());
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "convolve_resized_backward", [&] {
        each_crop<scalar_t>(crops, channels, out.mutable_data_ptr<scalar_t>(), in.const_data_ptr<scalar_t>(),
                            [](auto&&... crop) { propagate(crop...); });
    });
    return out.to(gradient.scalar_type());
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CPU, m) {
    m.impl("convolve_resized", &kg::convolve_resized);
    m.impl("convolve_resized_backward", &kg::convolve_resized_backward);
}
