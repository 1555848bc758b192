// Two kernels. The first finds, for all peaks at once, the nearest peak of every other type around the place where a
// peak expects it. The second opens the graphs, each of which depends on those before it: one block a group, its queue
// in order, one warp a keypoint type, for the partners of a start are of different types and do not see each other. The
// nearest peak of all is the partner if it is still queued; only otherwise the warp searches again. The nearest is the
// smallest of (distance, place in the queue), which does not depend on the order of looking, so every run gives the
// same graphs. Waits for the device once: for the number of graphs, and to hear of peaks at impossible positions, which
// are left out on the device.
#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "../grouping.h"
#include "launch.h"

namespace kg {
namespace {

constexpr unsigned kWarp = 32, kAllLanes = 0xffffffff;

// Added to the number of graphs where a peak is at an impossible position.
constexpr int64_t kImpossible = int64_t{1} << 32;

// Group and bucket of each peak; group -1 and one behind the last bucket for a peak at an impossible position.
__global__ void place_kernel(const int64_t* peaks, int64_t count, const Bins bins, int64_t* group, int64_t* bucket,
                             unsigned long long* impossible) {
    for (int64_t p = first_item(); p < count; p += item_step()) {
        const int64_t *peak = peaks + 4 * p, i = peak[0], k = peak[1], y = peak[2], x = peak[3];
        const bool possible =
            i >= 0 && k >= 0 && k < kKeypoints && y >= 0 && y < kMostPixels && x >= 0 && x < kMostPixels;
        group[p] = possible ? i : -1;
        bucket[p] = possible ? bins.bucket(i, k, bins.index(y), bins.index(x)) : static_cast<int64_t>(bins.buckets);
        if (!possible) {
            atomicMax(impossible, static_cast<unsigned long long>(kImpossible));
        }
    }
}

// Everything about the peaks of all groups that one block needs. Peaks are numbered as they come; those of a group are
// visited in that order.
struct Scene {
    const int64_t* peaks;         // [P,4] group, keypoint, y, x
    const double* scores;         // [P]
    const double* displacements;  // [P,4,2]
    const int64_t* queue;         // [P] peaks by group
    const int64_t* group;         // [P] of those in the queue
    const int64_t* binned;        // [P] peaks by bucket
    const int64_t* in_bucket;     // [buckets+1] where those of a bucket begin
    int64_t count;
    Bins bins;
    double match_radius, reject_radius;
    int64_t hops;
    int64_t* nearest;  // [P,4] of each other type, queued or not, around its expected place; -1: none in reach
    uint8_t *queued, *rejected;  // [P]

    __device__ int64_t keypoint(int64_t p) const { return peaks[4 * p + 1]; }
    __device__ int64_t y(int64_t p) const { return peaks[4 * p + 2]; }
    __device__ int64_t x(int64_t p) const { return peaks[4 * p + 3]; }

    // This warp calls visit(peak, squared distance) for peaks of type k around a point: all within reach, and some
    // beyond.
    template <typename Visit>
    __device__ void around(int64_t group_index, int64_t k, double at_x, double at_y, double reach, Visit visit) const {
        const Window window(bins, at_x, at_y, reach);
        const int rows = static_cast<int>(window.last_row - window.first_row + 1);
        const int columns = static_cast<int>(window.last_column - window.first_column + 1), cells = rows * columns;
        // All bins at the same time, as many lanes for each.
        const int lane = threadIdx.x % kWarp, share = max(static_cast<int>(kWarp) / max(cells, 1), 1);
        for (int cell = lane / share; cell < cells; cell += kWarp / share) {
            const int64_t bucket =
                bins.bucket(group_index, k, window.first_row + cell / columns, window.first_column + cell % columns);
            const int64_t end = in_bucket[bucket + 1];
            for (int64_t i = in_bucket[bucket] + lane % share; i < end; i += share) {
                const int64_t p = binned[i];
                if (peaks[4 * p] == group_index && keypoint(p) == k) {
                    visit(p, squared_norm(x(p) - at_x, y(p) - at_y));
                }
            }
        }
    }

    // This warp takes a peak out of the queue, into a graph.
    __device__ void join(int64_t group_index, int64_t p) const {
        __syncwarp();
        if (threadIdx.x % kWarp == 0) {
            queued[p] = 0;
        }
        around(group_index, keypoint(p), x(p), y(p), reject_radius, [&](int64_t other, double squared) {
            if (squared <= reject_radius * reject_radius) {
                rejected[other] = 1;
            }
        });
        __syncwarp();
    }

    // Where the peak of type l is expected from a peak: its place in `nearest`, and in `displacements` by twos.
    __device__ int64_t expected(int64_t source, int l) const {
        return (kKeypoints - 1) * source + other_index(static_cast<int>(keypoint(source)), l);
    }

    // The nearest peak of type l to where a peak expects it, among those that count(peak); -1 if there is none. For one
    // whole warp; all lanes have it.
    template <typename Counts>
    __device__ int64_t search(int64_t group_index, int64_t source, int l, Counts counts) const {
        const double* by = displacements + 2 * expected(source, l);
        Nearest best;
        around(group_index, l, x(source) + by[0], y(source) + by[1], match_radius, [&](int64_t p, double squared) {
            if (counts(p) && squared <= match_radius * match_radius) {
                best.offer(squared, p);
            }
        });
        __syncwarp();
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            const double squared = __shfl_xor_sync(kAllLanes, best.squared, distance);
            const long long peak = __shfl_xor_sync(kAllLanes, static_cast<long long>(best.peak), distance);
            best.offer(squared, peak);
        }
        return best.peak;
    }

    // The partner of type l that this warp finds from a peak, -1 if there is none; all lanes have it.
    __device__ int64_t partner(int64_t group_index, int64_t source, int l) const {
        const int64_t p = nearest[expected(source, l)];
        return p < 0 || queued[p] ? p : search(group_index, source, l, [&](int64_t other) { return queued[other]; });
    }

    // The next peak of the queue that opens a graph, from `place` on, which moves behind it; -1 at the end of the
    // group. Those passed over leave the queue. For one whole warp.
    __device__ int64_t next_start(int64_t group_index, int64_t& place) const {
        const unsigned lane = threadIdx.x % kWarp;
        while (place < count && group[place] == group_index) {
            // Both loads of a pair at the same time.
            const int64_t next = min(place + lane, count - 1), peak = queue[next], group_of_peak = group[next];
            const int64_t p = place + lane < count && group_of_peak == group_index ? peak : -1;
            const unsigned starts = __ballot_sync(kAllLanes, p >= 0 && (queued[p] & ~rejected[p]));
            const unsigned first = starts ? __ffs(static_cast<int>(starts)) - 1 : kWarp;
            if (p >= 0 && lane < first) {
                queued[p] = 0;
            }
            __syncwarp();
            if (starts) {
                place += first + 1;
                return __shfl_sync(kAllLanes, static_cast<long long>(p), first);
            }
            place += kWarp;
        }
        return -1;
    }
};

// Fills `nearest`, one warp for each peak and other type.
__global__ void nearest_kernel(const Scene scene) {
    constexpr int kOthers = kKeypoints - 1;
    for (int64_t i = first_item() / kWarp; i < scene.count * kOthers; i += item_step() / kWarp) {
        const int64_t group_index = scene.group[i / kOthers], p = scene.queue[i / kOthers];
        if (group_index >= 0) {
            const int other = static_cast<int>(i % kOthers), l = other < scene.keypoint(p) ? other : other + 1;
            const int64_t found = scene.search(group_index, p, l, [](int64_t) { return true; });
            if (threadIdx.x % kWarp == 0) {
                scene.nearest[kOthers * p + other] = found;
            }
        }
    }
}

// graphs [P,5,3]: those of a group from its first place in the queue on, where `opened` [P] is 1. The blocks of other
// places than the first of a group have nothing to do.
__global__ void group_kernel(const Scene scene, double* graphs, int64_t* opened) {
    int64_t place = blockIdx.x;
    const int64_t group_index = scene.group[place];
    if (group_index < 0 || (place > 0 && scene.group[place - 1] == group_index)) {
        return;
    }
    double* out = graphs + place * 3 * kKeypoints;
    int64_t* mark = opened + place;
    const int type = threadIdx.x / kWarp;
    const bool leads = threadIdx.x % kWarp == 0;
    __shared__ int64_t start, partners[kKeypoints];
    while (true) {
        if (type == 0) {
            const int64_t found = scene.next_start(group_index, place);
            if (leads) {
                start = found;
            }
        }
        __syncthreads();
        if (start < 0) {
            break;
        }
        const bool starts = type == scene.keypoint(start);
        int64_t member = starts ? start : scene.partner(group_index, start, type);
        if (member >= 0) {
            scene.join(group_index, member);
        }
        if (scene.hops == 2) {
            if (leads) {
                partners[type] = starts ? -1 : member;
            }
            __syncthreads();
            // From the partners by falling score, of equal ones by ascending type; each is taken once.
            bool taken[kKeypoints] = {};
            while (member < 0) {
                int best = -1;
                for (int l = 0; l < kKeypoints; ++l) {
                    if (partners[l] >= 0 && !taken[l] &&
                        (best < 0 || scene.scores[partners[l]] > scene.scores[partners[best]])) {
                        best = l;
                    }
                }
                if (best < 0) {
                    break;
                }
                taken[best] = true;
                member = scene.partner(group_index, partners[best], type);
                if (member >= 0) {
                    scene.join(group_index, member);
                }
            }
        }
        if (leads) {
            double* keypoint = out + 3 * type;
            keypoint[0] = member < 0 ? 0.0 : static_cast<double>(scene.x(member));
            keypoint[1] = member < 0 ? 0.0 : static_cast<double>(scene.y(member));
            keypoint[2] = member < 0 ? 0.0 : scene.scores[member];
        }
        if (threadIdx.x == 0) {
            *mark = 1;
        }
        out += 3 * kKeypoints;
        ++mark;
        // Nobody reads `start` and `partners` any more, and all peaks of this graph have left the queue.
        __syncthreads();
    }
}

// The graphs from where group_kernel left them to one behind the other; last: the place of each among them, from 1.
__global__ void gather_kernel(const double* graphs, const int64_t* opened, const int64_t* last, const int64_t* group,
                              int64_t count, double* out, int64_t* image) {
    for (int64_t i = first_item(); i < count * 3 * kKeypoints; i += item_step()) {
        const int64_t place = i / (3 * kKeypoints), value = i % (3 * kKeypoints);
        if (opened[place]) {
            out[(last[place] - 1) * 3 * kKeypoints + value] = graphs[i];
            if (value == 0) {
                image[last[place] - 1] = group[place];
            }
        }
    }
}

std::tuple<at::Tensor, at::Tensor> group_peaks(const at::Tensor& peaks, const at::Tensor& scores,
                                               const at::Tensor& displacements, double match_radius,
                                               double reject_radius, int64_t hops) {
    check_grouping(peaks, scores, displacements, match_radius, reject_radius, hops);
    const c10::cuda::CUDAGuard guard(peaks.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const int64_t count = peaks.size(0);
    const at::Tensor rows = peaks.contiguous();
    const auto dtype = c10::promoteTypes(scores.scalar_type(), at::kFloat);
    const at::TensorOptions whole = rows.options();
    if (count == 0) {
        return {at::empty({0, kKeypoints, 3}, scores.options().dtype(dtype)), at::empty({0}, whole)};
    }
    // As doubles, which hold every score and displacement exactly.
    const at::Tensor values = scores.to(at::kDouble).contiguous(), by = displacements.to(at::kDouble).contiguous();
    const Bins bins(count, match_radius, reject_radius);
    const at::Tensor groups = at::empty({count}, whole), buckets = at::empty({count}, whole);
    // 1 at each place of the queue that has a graph; behind them kImpossible where a peak is at such a position.
    const at::Tensor report = at::zeros({count + 1}, whole);
    int64_t* opened = report.mutable_data_ptr<int64_t>();
    place_kernel<<<blocks_for(count), kThreads, 0, stream>>>(
        rows.const_data_ptr<int64_t>(), count, bins, groups.mutable_data_ptr<int64_t>(),
        buckets.mutable_data_ptr<int64_t>(), reinterpret_cast<unsigned long long*>(opened + count));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    at::Tensor group, queue, bucket, binned;
    std::tie(group, queue) = at::sort(groups, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    std::tie(bucket, binned) = at::sort(buckets, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    const at::Tensor in_bucket = at::searchsorted(bucket, at::arange(static_cast<int64_t>(bins.buckets) + 1, whole));

    const at::Tensor found = at::empty({count, kKeypoints, 3}, values.options());
    const at::Tensor queued = at::ones({count}, whole.dtype(at::kByte)), rejected = at::zeros_like(queued);
    const at::Tensor nearest = at::empty({count, kKeypoints - 1}, whole);
    const Scene scene{rows.const_data_ptr<int64_t>(),
                      values.const_data_ptr<double>(),
                      by.const_data_ptr<double>(),
                      queue.const_data_ptr<int64_t>(),
                      group.const_data_ptr<int64_t>(),
                      binned.const_data_ptr<int64_t>(),
                      in_bucket.const_data_ptr<int64_t>(),
                      count,
                      bins,
                      match_radius,
                      reject_radius,
                      hops,
                      nearest.mutable_data_ptr<int64_t>(),
                      queued.mutable_data_ptr<uint8_t>(),
                      rejected.mutable_data_ptr<uint8_t>()};
    nearest_kernel<<<blocks_for(count * (kKeypoints - 1) * kWarp), kThreads, 0, stream>>>(scene);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    group_kernel<<<static_cast<unsigned>(count), kKeypoints * kWarp, 0, stream>>>(
        scene, found.mutable_data_ptr<double>(), opened);
    C10_CUDA_KERNEL_LAUNCH_CHECK();

    const at::Tensor last = report.cumsum(0);
    const int64_t told = last[count].item<int64_t>();
    if (told >= kImpossible) {
        const at::Tensor lowest = rows.amin(0).cpu(), highest = rows.amax(0).cpu();
        TORCH_CHECK_VALUE(false, "peaks: expected image, keypoint below 5, and y, x below 2^31, none negative, got ",
                          at::IntArrayRef(lowest.const_data_ptr<int64_t>(), 4), " to ",
                          at::IntArrayRef(highest.const_data_ptr<int64_t>(), 4));
    }
    const at::Tensor graphs = at::empty({told, kKeypoints, 3}, values.options());
    at::Tensor image = at::empty({told}, whole);
    gather_kernel<<<blocks_for(count * 3 * kKeypoints), kThreads, 0, stream>>>(
        found.const_data_ptr<double>(), opened, last.const_data_ptr<int64_t>(), group.const_data_ptr<int64_t>(), count,
        graphs.mutable_data_ptr<double>(), image.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {graphs.to(dtype), image};
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m) {
    m.impl("group_peaks", &kg::group_peaks);
}
