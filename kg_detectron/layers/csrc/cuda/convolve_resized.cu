// In two steps, as the reference: down the columns of the crops, then along their lines. Every thread adds up one value
// of the result in a fixed order, in the gradient too, so that no atomics are needed and every run gives the same.
// Never waits for the device.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../resizing.h"
#include "launch.h"

namespace kg {
namespace {

// One crop: where its products, lines and resized pixels begin, its sizes, and its place in the result.
struct Crop {
    int64_t first_product, first_line, first_pixel, height, width, resized_height, resized_width, place, stride;
};
constexpr int64_t kCropValues = sizeof(Crop) / sizeof(int64_t);

// The crop that holds item i, where `first` is the member that says where each begins.
__device__ const Crop& find_crop(const Crop* crops, int64_t count, int64_t Crop::* first, int64_t i) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (crops[middle].*first <= i ? low : high) = middle;
    }
    return crops[low];
}

// products [P,3,3,C] -> lines [L,3,C]; `values`: 3 C.
template <typename T>
__global__ void vertical_kernel(const T* products, const Crop* crops, int64_t crop_count, int64_t count, int64_t values,
                                T* lines) {
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const int64_t pixel = i / values, value = i % values;
        const Crop& crop = find_crop(crops, crop_count, &Crop::first_line, pixel);
        const int64_t y = (pixel - crop.first_line) / crop.width, x = (pixel - crop.first_line) % crop.width;
        T sum = 0;
        for (int tap = 0; tap < 3; ++tap) {
            const int64_t place = y + tap - 1;
            if (place >= 0 && place < crop.resized_height) {
                const Source<T> source(place, crop.height, crop.resized_height);
                const T* column = products + ((crop.first_product + x) * 3 + tap) * values + value;
                const int64_t row = crop.width * 3 * values;
                sum += source.weights[0] * column[source.low * row] + source.weights[1] * column[source.high * row];
            }
        }
        lines[i] = sum;
    }
}

// lines [L,3,C] -> out [pixels,C]
template <typename T>
__global__ void horizontal_kernel(const T* lines, const Crop* crops, int64_t crop_count, int64_t count,
                                  int64_t channels, T* out) {
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const int64_t pixel = i / channels, channel = i % channels;
        const Crop& crop = find_crop(crops, crop_count, &Crop::first_pixel, pixel);
        const int64_t y = (pixel - crop.first_pixel) / crop.resized_width;
        const int64_t x = (pixel - crop.first_pixel) % crop.resized_width;
        T sum = 0;
        for (int tap = 0; tap < 3; ++tap) {
            const int64_t place = x + tap - 1;
            if (place >= 0 && place < crop.resized_width) {
                const Source<T> source(place, crop.width, crop.resized_width);
                const T* line = lines + ((crop.first_line + y * crop.width) * 3 + tap) * channels + channel;
                sum += source.weights[0] * line[source.low * 3 * channels] +
                       source.weights[1] * line[source.high * 3 * channels];
            }
        }
        out[(crop.place + y * crop.stride + x) * channels + channel] = sum;
    }
}

// The transpose of horizontal_kernel: gradient [pixels,C] -> lines [L,3,C]
template <typename T>
__global__ void horizontal_gradient_kernel(const T* gradient, const Crop* crops, int64_t crop_count, int64_t count,
                                           int64_t channels, T* lines) {
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const int64_t pixel = i / (3 * channels), channel = i % channels;
        const int tap = static_cast<int>(i / channels % 3);
        const Crop& crop = find_crop(crops, crop_count, &Crop::first_line, pixel);
        const int64_t y = (pixel - crop.first_line) / crop.width, column = (pixel - crop.first_line) % crop.width;
        const Destinations destinations(column, crop.width, crop.resized_width);
        T sum = 0;
        for (int64_t place = destinations.first; place <= destinations.last; ++place) {
            const int64_t x = place - tap + 1;
            if (x >= 0 && x < crop.resized_width) {
                const T weight = Source<T>(place, crop.width, crop.resized_width).weight(column);
                sum += weight * gradient[(crop.place + y * crop.stride + x) * channels + channel];
            }
        }
        lines[i] = sum;
    }
}

// The transpose of vertical_kernel: lines [L,3,C] -> products [P,3,3,C]; `values`: 3 C.
template <typename T>
__global__ void vertical_gradient_kernel(const T* lines, const Crop* crops, int64_t crop_count, int64_t count,
                                         int64_t values, T* products) {
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const int64_t pixel = i / (3 * values), value = i % values;
        const int tap = static_cast<int>(i / values % 3);
        const Crop& crop = find_crop(crops, crop_count, &Crop::first_product, pixel);
        const int64_t row = (pixel - crop.first_product) / crop.width, x = (pixel - crop.first_product) % crop.width;
        const Destinations destinations(row, crop.height, crop.resized_height);
        T sum = 0;
        for (int64_t place = destinations.first; place <= destinations.last; ++place) {
            const int64_t y = place - tap + 1;
            if (y >= 0 && y < crop.resized_height) {
                const T weight = Source<T>(place, crop.height, crop.resized_height).weight(row);
                sum += weight * lines[(crop.first_line + y * crop.width + x) * values + value];
            }
        }
        products[i] = sum;
    }
}

// The crops as the kernels take them.
struct Table {
    at::Tensor crops;  // [R,9] on the device
    int64_t count, line_pixels = 0;

    Table(const Crops& checked, const at::Device& device) : count(static_cast<int64_t>(checked.first.size())) {
        crops = at::empty({count, kCropValues}, at::kLong);
        const auto *before = checked.before.const_data_ptr<int64_t>(), *after = checked.after.const_data_ptr<int64_t>(),
                   *place = checked.places.const_data_ptr<int64_t>();
        Crop* crop = reinterpret_cast<Crop*>(crops.mutable_data_ptr<int64_t>());
        int64_t pixels = 0;
        for (int64_t r = 0; r < count; ++r, ++crop, before += 2, after += 2, place += 2) {
            *crop = {checked.first[r], line_pixels, pixels,   before[0], before[1],
                     after[0],         after[1],    place[0], place[1]};
            line_pixels += after[0] * before[1];
            pixels += after[0] * after[1];
        }
        crops = crops.to(device, /*non_blocking=*/true);
    }

    const Crop* data() const { return reinterpret_cast<const Crop*>(crops.const_data_ptr<int64_t>()); }
};

at::Tensor convolve_resized(const at::Tensor& products, const at::Tensor& before, const at::Tensor& after,
                            const at::Tensor& places, int64_t pixels) {
    check_products(products);
    const Crops checked = check_crops(products.size(0), before, after, places, pixels);
    const c10::cuda::CUDAGuard guard(products.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const at::Tensor in = products.to(c10::promoteTypes(products.scalar_type(), at::kFloat)).contiguous();
    const int64_t channels = in.size(2);
    const bool full = checked.resized == pixels;
    at::Tensor out = full ? at::empty({pixels, channels}, in.options()) : at::zeros({pixels, channels}, in.options());
    if (checked.resized == 0 || channels == 0) {
        return out.to(products.scalar_type());
    }
    const Table table(checked, products.device());
    const at::Tensor lines = at::empty({table.line_pixels, 3, channels}, in.options());
    const int64_t line_values = lines.numel(), values = checked.resized * channels;
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "convolve_resized", [&] {
        vertical_kernel<<<blocks_for(line_values), kThreads, 0, stream>>>(in.const_data_ptr<scalar_t>(), table.data(),
                                                                          table.count, line_values, 3 * channels,
                                                                          lines.mutable_data_ptr<scalar_t>());
        horizontal_kernel<<<blocks_for(values), kThreads, 0, stream>>>(lines.const_data_ptr<scalar_t>(), table.data(),
                                                                       table.count, values, channels,
                                                                       out.mutable_data_ptr<scalar_t>());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return out.to(products.scalar_type());
}

at::Tensor convolve_resized_backward(const at::Tensor& gradient, int64_t products, const at::Tensor& before,
                                     const at::Tensor& after, const at::Tensor& places) {
    check_gradient(gradient);
    const Crops checked = check_crops(products, before, after, places, gradient.size(0));
    const c10::cuda::CUDAGuard guard(gradient.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const at::Tensor in = gradient.to(c10::promoteTypes(gradient.scalar_type(), at::kFloat)).contiguous();
    const int64_t channels = in.size(1);
    at::Tensor out = at::empty({products, 9, channels}, in.options());
    if (out.numel() == 0) {
        return out.to(gradient.scalar_type());
    }
    const Table table(checked, gradient.device());
    const at::Tensor lines = at::empty({table.line_pixels, 3, channels}, in.options());
    const int64_t line_values = lines.numel(), values = out.numel();
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "convolve_resized_backward", [&] {
        horizontal_gradient_kernel<<<blocks_for(line_values), kThreads, 0, stream>>>(
            in.const_data_ptr<scalar_t>(), table.data(), table.count, line_values, channels,
            lines.mutable_data_ptr<scalar_t>());
        vertical_gradient_kernel<<<blocks_for(values), kThreads, 0, stream>>>(
            lines.const_data_ptr<scalar_t>(), table.data(), table.count, values, 3 * channels,
            out.mutable_data_ptr<scalar_t>());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return out.to(gradient.scalar_type());
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m) {
    m.impl("convolve_resized", &kg::convolve_resized);
    m.impl("convolve_resized_backward", &kg::convolve_resized_backward);
}
