#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "vectorize.h"

namespace kg {
namespace {

// Channels that are worked on together: as many as fill a cache line. Elsewhere one by one.
#ifdef __GNUC__
template <typename T>
struct Together {
    typedef T type __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
};
#else
template <typename T>
struct Together {
    typedef T type;
};
#endif

// A depthwise convolution, the same to both sides, of maps with the channels last.
struct Depthwise {
    int64_t channels, kernel, stride, padding;
    int64_t height, width;          // of the input
    int64_t out_height, out_width;  // of the result

    // The first and the last (exclusive) place in the result whose tap lies in an input of this length.
    int64_t first(int64_t tap) const { return std::max<int64_t>(0, (padding - tap + stride - 1) / stride); }
    int64_t last(int64_t tap, int64_t length, int64_t out_length) const {
        const int64_t reach = length - 1 + padding - tap;
        return reach < 0 ? 0 : std::min(out_length, reach / stride + 1);
    }
};

// sums[k] += the products of the gradient and the input under tap + k, over columns from first to last.
template <typename V, int kTaps, typename T>
KG_INLINE void add_taps(const T* gradient, const T* input, const Depthwise& of, int64_t tap, int64_t first,
                        int64_t last, V* sums) {
    V found[kTaps] = {};
    for (int64_t x = first; x < last; ++x) {
        const V out = *reinterpret_cast<const V*>(gradient + x * of.channels);
        const T* in = input + (x * of.stride + tap - of.padding) * of.channels;
        for (int k = 0; k < kTaps; ++k) {
            found[k] += out * *reinterpret_cast<const V*>(in + k * of.channels);
        }
    }
    for (int k = 0; k < kTaps; ++k) {
        sums[tap + k] += found[k];
    }
}

// All taps of a row of the kernel: where each of them lies in the row of the input together, at the edges one by one.
template <typename V, typename T>
KG_INLINE void add_row(const T* gradient, const T* input, const Depthwise& of, V* sums) {
    int64_t first = of.first(0), last = of.last(of.kernel - 1, of.width, of.out_width);
    if (of.kernel == 3 && first < last) {
        add_taps<V, 3>(gradient, input, of, 0, first, last, sums);
    } else if (of.kernel == 5 && first < last) {
        add_taps<V, 5>(gradient, input, of, 0, first, last, sums);
    } else if (of.kernel == 7 && first < last) {
        add_taps<V, 7>(gradient, input, of, 0, first, last, sums);
    } else {
        first = last = of.out_width;
    }
    for (int64_t tap = 0; tap < of.kernel; ++tap) {
        const int64_t begin = of.first(tap), end = of.last(tap, of.width, of.out_width);
        add_taps<V, 1>(gradient, input, of, tap, begin, std::min(end, first), sums);
        add_taps<V, 1>(gradient, input, of, tap, std::max(begin, last), end, sums);
    }
}

// Of one image: gradient and input at the first of the channels -> sums (kernel, kernel).
template <typename V, typename T>
KG_INLINE void add_image(const T* gradient, const T* input, const Depthwise& of, V* sums) {
    for (int64_t y = 0; y < of.out_height; ++y) {
        for (int64_t tap = 0; tap < of.kernel; ++tap) {
            const int64_t row = y * of.stride + tap - of.padding;
            if (row >= 0 && row < of.height) {
                add_row(gradient + y * of.out_width * of.channels, input + row * of.width * of.channels, of,
                        sums + tap * of.kernel);
            }
        }
    }
}

KG_VECTORIZE void add_together(const float* gradient, const float* input, const Depthwise& of,
                               Together<float>::type* sums) {
    add_image(gradient, input, of, sums);
}

KG_VECTORIZE void add_together(const double* gradient, const double* input, const Depthwise& of,
                               Together<double>::type* sums) {
    add_image(gradient, input, of, sums);
}

at::Tensor depthwise_weight_gradient(const at::Tensor& input, const at::Tensor& gradient, int64_t kernel,
                                     int64_t stride, int64_t padding) {
    check_depthwise(input, gradient, kernel, stride, padding);
    const auto dtype = c10::promoteTypes(input.scalar_type(), at::kFloat);
    const at::Tensor in = input.to(dtype).contiguous(at::MemoryFormat::ChannelsLast);
    const at::Tensor out = gradient.to(dtype).contiguous(at::MemoryFormat::ChannelsLast);
    const int64_t images = in.size(0), channels = in.size(1), taps = kernel * kernel;
    const Depthwise of{channels, kernel, stride, padding, in.size(2), in.size(3), out.size(2), out.size(3)};
    const at::Tensor found = at::empty({images, channels, kernel, kernel}, in.options());
    AT_DISPATCH_FLOATING_TYPES(dtype, "depthwise_weight_gradient", [&] {
        using Lanes = typename Together<scalar_t>::type;
        constexpr int64_t lanes = sizeof(Lanes) / sizeof(scalar_t);
        const scalar_t *from = in.const_data_ptr<scalar_t>(), *by = out.const_data_ptr<scalar_t>();
        scalar_t* to = found.mutable_data_ptr<scalar_t>();
        // Of each image the channels that are worked on together, then what is left of them. Sums never depend on the
        // number of threads.
        const int64_t blocks = channels / lanes, parts = blocks + channels % lanes;
        at::parallel_for(0, images * parts, 1, [&](int64_t begin, int64_t end) {
            std::vector<scalar_t> sums(taps * lanes);
            for (int64_t task = begin; task < end; ++task) {
                const int64_t image = task / parts, part = task % parts;
                const int64_t channel = part < blocks ? part * lanes : blocks * lanes + part - blocks;
                const int64_t width = part < blocks ? lanes : 1;
                const scalar_t* a = by + image * of.out_height * of.out_width * channels + channel;
                const scalar_t* b = from + image * of.height * of.width * channels + channel;
                std::fill(sums.begin(), sums.end(), scalar_t(0));
                if (part < blocks) {
                    add_together(a, b, of, reinterpret_cast<Lanes*>(sums.data()));
                } else {
                    add_image(a, b, of, sums.data());
                }
                scalar_t* place = to + (image * channels + channel) * taps;
                for (int64_t i = 0; i < taps * width; ++i) {
                    place[i % width * taps + i / width] = sums[i];
                }
            }
        });
    });
    at::Tensor total = at::zeros({channels, kernel, kernel}, in.options());
    for (int64_t image = 0; image < images; ++image) {
        total.add_(found[image]);
    }
    return total.unsqueeze(1).to(input.scalar_type());
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CPU, m) {
    m.impl("depthwise_weight_gradient", &kg::depthwise_weight_gradient);
}
