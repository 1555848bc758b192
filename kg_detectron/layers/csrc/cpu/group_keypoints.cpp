#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../grouping.h"

namespace kg {
namespace {

// Places in the queue by which memory is asked for ahead.
constexpr int64_t kAhead = 16;

// Counting sort: `order` lists 0 .. keys.size() - 1 by key, stable; those of key b are order[first[b]] .. [first[b +
// 1]].
struct Buckets {
    std::vector<int32_t> first, order;

    Buckets(const std::vector<int64_t>& keys, int64_t count) : first(count + 1), order(keys.size()) {
        for (int64_t key : keys) {
            ++first[key + 1];
        }
        std::partial_sum(first.begin(), first.end(), first.begin());
        std::vector<int32_t> next(first.begin(), first.end() - 1);
        for (size_t i = 0; i < keys.size(); ++i) {
            order[next[keys[i]]++] = static_cast<int32_t>(i);
        }
    }
};

// The peaks of one image and what has become of them. Peaks are numbered by their place in the queue.
class Queue {
  public:
    // peak [P,4]: image, keypoint, y, x; members: the peaks of this image in their order.
    Queue(const int64_t* peak, const int32_t* members, int64_t count, int64_t height, int64_t width)
        : queued(count, 1), rejected(count, 0), members_(members), bins_(height, width) {
        spots_.reserve(count);
        std::vector<int64_t> bin;
        bin.reserve(count);
        for (int64_t p = 0; p < count; ++p) {
            const int64_t *own = peak + 4 * members[p], k = own[1], y = own[2], x = own[3];
            spots_.push_back(
                {static_cast<int32_t>(p), static_cast<int32_t>(k), static_cast<int32_t>(y), static_cast<int32_t>(x)});
            bin.push_back(bins_.of(0, k, y, x));
        }
        Buckets buckets(bin, kKeypoints * bins_.rows * bins_.columns);
        first_ = std::move(buckets.first);
        binned_.reserve(count);
        for (int32_t p : buckets.order) {
            binned_.push_back(spots_[p]);
        }
    }

    int64_t size() const { return static_cast<int64_t>(spots_.size()); }
    int64_t index(int64_t p) const { return members_[p]; }
    int keypoint(int64_t p) const { return spots_[p].k; }
    int64_t y(int64_t p) const { return spots_[p].y; }
    int64_t x(int64_t p) const { return spots_[p].x; }

    // Calls visit(peak, squared distance) for the peaks of type k around a point: all within reach, and some beyond.
    template <typename Visit>
    void around(int64_t k, double at_x, double at_y, double reach, Visit visit) const {
        const Window window(bins_, at_x, at_y, reach);
        if (window.first_column > window.last_column) {
            return;
        }
        for (int64_t row = window.first_row; row <= window.last_row; ++row) {
            const int64_t bin = bins_.row(0, k, row);
            const int64_t end = first_[bin + window.last_column + 1];
            for (int64_t i = first_[bin + window.first_column]; i < end; ++i) {
                visit(binned_[i].peak, squared_norm(binned_[i].x - at_x, binned_[i].y - at_y));
            }
        }
    }

    std::vector<uint8_t> queued, rejected;

  private:
    struct Spot {
        int32_t peak, k, y, x;
    };

    const int32_t* members_;
    Bins bins_;
    std::vector<Spot> spots_, binned_;  // in the order of the queue, and by bin
    std::vector<int32_t> first_;        // of each bin, in binned_
};

struct Radii {
    double match, reject;
};

// Group offsets [40,h,w] of one image, in any layout.
template <typename T>
struct Offsets {
    const T* data;
    int64_t channel, row, column;  // strides

    const T* at(int64_t c, int64_t y, int64_t x) const { return data + c * channel + y * row + x * column; }
    double operator()(int64_t c, int64_t y, int64_t x) const { return static_cast<double>(*at(c, y, x)); }
};

// The offsets of a start lie far apart in memory, which takes long to bring them: ask for those of a later one already.
template <typename T>
void prefetch(const Queue& queue, const Offsets<T>& offsets, int64_t p) {
#ifdef __GNUC__
    for (int l = 0; l < kKeypoints; ++l) {
        if (l != queue.keypoint(p)) {
            const int edge = edge_index(queue.keypoint(p), l);
            __builtin_prefetch(offsets.at(2 * edge, queue.y(p), queue.x(p)));
            __builtin_prefetch(offsets.at(2 * edge + 1, queue.y(p), queue.x(p)));
        }
    }
#endif
}

void join(Queue& queue, int64_t p, const Radii& radii, std::array<int64_t, kKeypoints>& graph) {
    const int64_t k = queue.keypoint(p);
    graph[k] = p;
    queue.queued[p] = 0;
    queue.around(k, queue.x(p), queue.y(p), radii.reject, [&](int64_t other, double squared) {
        queue.rejected[other] |= squared <= radii.reject * radii.reject;
    });
}

template <typename T>
int64_t partner(const Queue& queue, const Offsets<T>& offsets, int64_t source, int l, const Radii& radii) {
    const int edge = edge_index(queue.keypoint(source), l);
    const int64_t x = queue.x(source), y = queue.y(source);
    Nearest nearest;
    queue.around(l, x + offsets(2 * edge, y, x), y + offsets(2 * edge + 1, y, x), radii.match,
                 [&](int64_t p, double squared) {
                     if (queue.queued[p] && squared <= radii.match * radii.match) {
                         nearest.offer(squared, p);
                     }
                 });
    return nearest.peak;
}

// Graphs of one image, in the order in which they are opened: the peak of each keypoint, -1 = missing.
template <typename T, typename S>
std::vector<std::array<int64_t, kKeypoints>> group_image(Queue& queue, const S* scores, const Offsets<T>& offsets,
                                                         const Radii& radii, int64_t hops) {
    std::vector<std::array<int64_t, kKeypoints>> graphs;
    for (int64_t start = 0; start < queue.size(); ++start) {
        if (start + kAhead < queue.size() && queue.queued[start + kAhead]) {
            prefetch(queue, offsets, start + kAhead);
        }
        if (!queue.queued[start]) {
            continue;
        }
        queue.queued[start] = 0;
        if (queue.rejected[start]) {
            continue;
        }
        std::array<int64_t, kKeypoints> graph;
        graph.fill(-1);
        join(queue, start, radii, graph);
        // Partners of the start by falling score, of equal ones by ascending type.
        std::array<int64_t, kKeypoints> joined;
        int count = 0;
        for (int l = 0; l < kKeypoints; ++l) {
            const int64_t found = graph[l] < 0 ? partner(queue, offsets, start, l, radii) : -1;
            if (found >= 0) {
                join(queue, found, radii, graph);
                int place = count++;
                for (; place > 0 && scores[queue.index(joined[place - 1])] < scores[queue.index(found)]; --place) {
                    joined[place] = joined[place - 1];
                }
                joined[place] = found;
            }
        }
        for (int l = 0; hops == 2 && l < kKeypoints; ++l) {
            for (int j = 0; j < count && graph[l] < 0; ++j) {
                const int64_t found = partner(queue, offsets, joined[j], l, radii);
                if (found >= 0) {
                    join(queue, found, radii, graph);
                }
            }
        }
        for (int64_t& p : graph) {
            p = p < 0 ? -1 : queue.index(p);
        }
        graphs.push_back(graph);
    }
    return graphs;
}

std::tuple<at::Tensor, at::Tensor> group_keypoints(const at::Tensor& peaks, const at::Tensor& scores,
                                                   const at::Tensor& group_offsets, double match_radius,
                                                   double reject_radius, int64_t hops) {
    check_grouping(peaks, scores, group_offsets);
    const int64_t n = group_offsets.size(0), h = group_offsets.size(2), w = group_offsets.size(3);
    TORCH_CHECK_VALUE(peaks.size(0) < std::numeric_limits<int32_t>::max(), "peaks: expected less than 2^31");
    const at::Tensor every = peaks.contiguous();
    const at::Tensor values = scores.to(c10::promoteTypes(scores.scalar_type(), at::kFloat)).contiguous();
    const int64_t* peak = every.const_data_ptr<int64_t>();
    const int64_t limit[4] = {n, kKeypoints, h, w};
    std::vector<int64_t> image(every.size(0));
    for (int64_t i = 0; i < every.numel(); ++i) {
        TORCH_CHECK_VALUE(peak[i] >= 0 && peak[i] < limit[i % 4], "peaks: expected image, keypoint, y, x below [", n,
                          ", 5, ", h, ", ", w, "], got ", peak[i], " in column ", i % 4);
        if (i % 4 == 0) {
            image[i / 4] = peak[i];
        }
    }
    const Buckets images(image, n);
    const Radii radii{match_radius, reject_radius};

    std::vector<std::vector<std::array<int64_t, kKeypoints>>> found(n);
    at::Tensor graphs, graph_image;
    AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "group_keypoints", [&] {
        using score_t = scalar_t;
        const score_t* score = values.const_data_ptr<score_t>();
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, group_offsets.scalar_type(), "group_keypoints", [&] {
            const scalar_t* offset = group_offsets.const_data_ptr<scalar_t>();
            at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                    const int64_t first = images.first[i], count = images.first[i + 1] - first;
                    if (count) {
                        Queue queue(peak, images.order.data() + first, count, h, w);
                        const Offsets<scalar_t> offsets{offset + i * group_offsets.stride(0), group_offsets.stride(1),
                                                        group_offsets.stride(2), group_offsets.stride(3)};
                        found[i] = group_image(queue, score, offsets, radii, hops);
                    }
                }
            });
        });
        int64_t total = 0;
        for (const auto& own : found) {
            total += static_cast<int64_t>(own.size());
        }
        graphs = at::empty({total, kKeypoints, 3}, values.options());
        graph_image = at::empty({total}, every.options());
        score_t* to = graphs.mutable_data_ptr<score_t>();
        int64_t* to_image = graph_image.mutable_data_ptr<int64_t>();
        for (int64_t i = 0; i < n; ++i) {
            for (const auto& graph : found[i]) {
                *to_image++ = i;
                for (int64_t p : graph) {
                    *to++ = p < 0 ? 0 : static_cast<score_t>(peak[4 * p + 3]);
                    *to++ = p < 0 ? 0 : static_cast<score_t>(peak[4 * p + 2]);
                    *to++ = p < 0 ? 0 : score[p];
                }
            }
        }
    });
    return {graphs, graph_image};
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CPU, m) {
    m.impl("group_keypoints", &kg::group_keypoints);
}
