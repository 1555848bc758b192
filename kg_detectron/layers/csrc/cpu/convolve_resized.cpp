#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "tasks.h"
#include "vectorize.h"

namespace kg {
namespace {

// Where a pixel of a resized line comes from: two pixels of the line before, and their weights (align_corners False).
template <typename T>
struct Source {
    int64_t low, high;
    T weights[2];
};

template <typename T>
std::vector<Source<T>> sources(int64_t before, int64_t after) {
    std::vector<Source<T>> line(after);
    const T scale = static_cast<T>(before) / static_cast<T>(after);
    for (int64_t i = 0; i < after; ++i) {
        const T at = std::min(std::max((i + T(0.5)) * scale - T(0.5), T(0)), static_cast<T>(before - 1));
        const int64_t low = static_cast<int64_t>(at);
        line[i] = {low, std::min(low + 1, before - 1), {1 - (at - low), at - low}};
    }
    return line;
}

// Up to three taps of two pixels each.
template <typename T, typename Pointer>
struct Terms {
    int count = 0;
    T weights[6];
    Pointer lines[6];

    void add(T weight, Pointer line) {
        weights[count] = weight;
        lines[count++] = line;
    }
};

// Blocks of a fixed length stay in registers.
template <typename T>
constexpr int64_t kBlock = 64 / sizeof(T);

// out[i] = sum of weights[t] * lines[t][i]
template <typename T>
KG_INLINE void blend_lines(const Terms<T, const T*>& terms, int64_t length, T* out) {
    int64_t i = 0;
    for (; i + kBlock<T> <= length; i += kBlock<T>) {
        T sum[kBlock<T>] = {};
        for (int t = 0; t < terms.count; ++t) {
            for (int64_t b = 0; b < kBlock<T>; ++b) {
                sum[b] += terms.weights[t] * terms.lines[t][i + b];
            }
        }
        for (int64_t b = 0; b < kBlock<T>; ++b) {
            out[i + b] = sum[b];
        }
    }
    for (; i < length; ++i) {
        T sum = 0;
        for (int t = 0; t < terms.count; ++t) {
            sum += terms.weights[t] * terms.lines[t][i];
        }
        out[i] = sum;
    }
}

KG_VECTORIZE void blend(const Terms<float, const float*>& terms, int64_t length, float* out) {
    blend_lines(terms, length, out);
}

KG_VECTORIZE void blend(const Terms<double, const double*>& terms, int64_t length, double* out) {
    blend_lines(terms, length, out);
}

// The reverse: lines[t][i] += weights[t] * in[i]
template <typename T>
KG_INLINE void spread_line(const Terms<T, T*>& terms, int64_t length, const T* in) {
    for (int t = 0; t < terms.count; ++t) {
        T* line = terms.lines[t];
        const T weight = terms.weights[t];
        for (int64_t i = 0; i < length; ++i) {
            line[i] += weight * in[i];
        }
    }
}

KG_VECTORIZE void spread(const Terms<float, float*>& terms, int64_t length, const float* in) {
    spread_line(terms, length, in);
}

KG_VECTORIZE void spread(const Terms<double, double*>& terms, int64_t length, const double* in) {
    spread_line(terms, length, in);
}

// One crop, its products [h,w,3,3,C] and its place in the result [H,W,C], whose rows lie `stride` pixels apart. A line is
// what the products of all rows give for one row of the result: [w,3,C].
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
    Terms<T, Pointer> vertical(Pointer products, int64_t y, int64_t x) const {
        Terms<T, Pointer> terms;
        for (int64_t tap = 0; tap < 3; ++tap) {
            if (const int64_t at = y + tap - 1; at >= 0 && at < static_cast<int64_t>(rows.size())) {
                const Source<T>& row = rows[at];
                terms.add(row.weights[0], products + ((row.low * width + x) * 3 + tap) * 3 * channels);
                terms.add(row.weights[1], products + ((row.high * width + x) * 3 + tap) * 3 * channels);
            }
        }
        return terms;
    }

    template <typename Pointer>
    Terms<T, Pointer> horizontal(Pointer line, int64_t x) const {
        Terms<T, Pointer> terms;
        for (int64_t tap = 0; tap < 3; ++tap) {
            if (const int64_t at = x + tap - 1; at >= 0 && at < static_cast<int64_t>(columns.size())) {
                const Source<T>& column = columns[at];
                terms.add(column.weights[0], line + (column.low * 3 + tap) * channels);
                terms.add(column.weights[1], line + (column.high * 3 + tap) * channels);
            }
        }
        return terms;
    }

    void convolve(const T* products, T* out, int64_t stride, std::vector<T>& line) const {
        line.resize(line_length());
        for (size_t y = 0; y < rows.size(); ++y) {
            for (int64_t x = 0; x < width; ++x) {
                blend(vertical(products, y, x), 3 * channels, line.data() + x * 3 * channels);
            }
            for (size_t x = 0; x < columns.size(); ++x) {
                blend(horizontal<const T*>(line.data(), x), channels, out + (y * stride + x) * channels);
            }
        }
    }

    void propagate(T* products, const T* out, int64_t stride, std::vector<T>& line) const {
        for (size_t y = 0; y < rows.size(); ++y) {
            line.assign(line_length(), 0);
            for (size_t x = 0; x < columns.size(); ++x) {
                spread(horizontal<T*>(line.data(), x), channels, out + (y * stride + x) * channels);
            }
            for (int64_t x = 0; x < width; ++x) {
                spread(vertical(products, y, x), 3 * channels, line.data() + x * 3 * channels);
            }
        }
    }
};

// The crops' first rows among the products; all crops lie where they should.
std::vector<int64_t> check_crops(int64_t products, const at::Tensor& before, const at::Tensor& after,
                                 const at::Tensor& places, int64_t pixels) {
    const int64_t crops = before.size(0);
    for (const at::Tensor* table : {&before, &after, &places}) {
        TORCH_CHECK_VALUE(table->dim() == 2 && table->size(0) == crops && table->size(1) == 2 &&
                              table->scalar_type() == at::kLong && table->is_contiguous() && table->device().is_cpu(),
                          "before, after and places: expected contiguous int64 (R,2) on the CPU, got ",
                          before.sizes(), ", ", after.sizes(), " and ", places.sizes());
    }
    const auto *from = before.const_data_ptr<int64_t>(), *to = after.const_data_ptr<int64_t>(),
               *place = places.const_data_ptr<int64_t>();
    std::vector<int64_t> first(crops);
    int64_t used = 0;
    for (int64_t r = 0; r < crops; ++r, from += 2, to += 2, place += 2) {
        TORCH_CHECK_VALUE(from[0] > 0 && from[1] > 0 && to[0] > 0 && to[1] > 0, "before and after: expected sides of ",
                          "at least 1, got ", from[0], " x ", from[1], " and ", to[0], " x ", to[1]);
        const int64_t last = place[0] + (to[0] - 1) * place[1] + to[1] - 1;
        TORCH_CHECK_VALUE(place[0] >= 0 && place[1] >= to[1] && last < pixels, "places: expected crops within ", pixels,
                          " pixels, got ", place[0], " with ", place[1], " pixels a row for ", to[0], " x ", to[1]);
        first[r] = used;
        used += from[0] * from[1];
    }
    TORCH_CHECK_VALUE(used == products, "products: expected ", used, " pixels, got ", products);
    return first;
}

// Larger crops first: the last thread to finish should have little left to do.
std::vector<int64_t> by_size(const at::Tensor& after) {
    const auto* size = after.const_data_ptr<int64_t>();
    std::vector<int64_t> order(after.size(0));
    for (size_t r = 0; r < order.size(); ++r) {
        order[r] = static_cast<int64_t>(r);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return size[2 * a] * size[2 * a + 1] > size[2 * b] * size[2 * b + 1];
    });
    return order;
}

template <typename Run>
void each_crop(const at::Tensor& after, const Run& run) {
    const std::vector<int64_t> order = by_size(after);
    each_task(static_cast<int64_t>(order.size()), [&](int64_t task) { run(order[task]); });
}

at::Tensor convolve_resized(const at::Tensor& products, const at::Tensor& before, const at::Tensor& after,
                            const at::Tensor& places, int64_t pixels) {
    TORCH_CHECK_VALUE(products.dim() == 3 && products.size(1) == 9, "products: expected (P,9,C), got ",
                      products.sizes());
    const std::vector<int64_t> first = check_crops(products.size(0), before, after, places, pixels);
    const at::Tensor in = products.to(c10::promoteTypes(products.scalar_type(), at::kFloat)).contiguous();
    const int64_t channels = in.size(2);
    at::Tensor out = at::zeros({pixels, channels}, in.options());
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "convolve_resized", [&] {
        const auto* from = in.const_data_ptr<scalar_t>();
        auto* to = out.mutable_data_ptr<scalar_t>();
        const auto *sizes = before.const_data_ptr<int64_t>(), *resized = after.const_data_ptr<int64_t>(),
                   *place = places.const_data_ptr<int64_t>();
        each_crop(after, [&](int64_t r) {
            thread_local std::vector<scalar_t> line;
            Crop<scalar_t>(sizes + 2 * r, resized + 2 * r, channels)
                .convolve(from + first[r] * 9 * channels, to + place[2 * r] * channels, place[2 * r + 1], line);
        });
    });
    return out.to(products.scalar_type());
}

at::Tensor convolve_resized_backward(const at::Tensor& gradient, int64_t products, const at::Tensor& before,
                                     const at::Tensor& after, const at::Tensor& places) {
    TORCH_CHECK_VALUE(gradient.dim() == 2, "gradient: expected (pixels,C), got ", gradient.sizes());
    const std::vector<int64_t> first = check_crops(products, before, after, places, gradient.size(0));
    const at::Tensor in = gradient.to(c10::promoteTypes(gradient.scalar_type(), at::kFloat)).contiguous();
    const int64_t channels = in.size(1);
    at::Tensor out = at::zeros({products, 9, channels}, in.options());
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "convolve_resized_backward", [&] {
        const auto* from = in.const_data_ptr<scalar_t>();
        auto* to = out.mutable_data_ptr<scalar_t>();
        const auto *sizes = before.const_data_ptr<int64_t>(), *resized = after.const_data_ptr<int64_t>(),
                   *place = places.const_data_ptr<int64_t>();
        each_crop(after, [&](int64_t r) {
            thread_local std::vector<scalar_t> line;
            Crop<scalar_t>(sizes + 2 * r, resized + 2 * r, channels)
                .propagate(to + first[r] * 9 * channels, from + place[2 * r] * channels, place[2 * r + 1], line);
        });
    });
    return out.to(gradient.scalar_type());
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CPU, m) {
    m.impl("convolve_resized", &kg::convolve_resized);
    m.impl("convolve_resized_backward", &kg::convolve_resized_backward);
}
