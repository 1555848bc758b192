#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../grouping.h"
#include "tasks.h"

namespace kg {
namespace {

struct Radii {
    double match, reject;
};

// Number of peaks for which memory is requested ahead: the next ones of the queue lie anywhere in the map.
constexpr int64_t kAhead = 8;

// The peaks of one group and their state. Peaks are numbered by their place in the queue, and stored by bin, so that a
// search reads neighbouring memory.
class Queue {
  public:
    struct Spot {
        int32_t peak, y, x;
        int8_t k;
        bool queued;
    };

    // peak [P,4]: image, keypoint, y, x; members: the peaks of this group in their order.
    Queue(const int64_t* peak, const int32_t* members, int64_t count, const Radii& radii)
        : members_(members),
          bins_(count, radii.match, radii.reject),
          spots_(count),
          place_(count),
          first_(bins_.buckets + 1),
          joined_(bins_.buckets, -1),
          next_(count) {
        // Counting sort. First the bucket of each peak stands for its place.
        for (int64_t p = 0; p < count; ++p) {
            const int64_t* row = peak + 4 * members[p];
            place_[p] = static_cast<int32_t>(bins_.bucket(0, row[1], bins_.index(row[2]), bins_.index(row[3])));
            ++first_[place_[p]];
        }
        std::partial_sum(first_.begin(), first_.end(), first_.begin());
        for (int64_t p = count - 1; p >= 0; --p) {
            const int64_t* row = peak + 4 * members[p];
            place_[p] = --first_[place_[p]];
            spots_[place_[p]] = {static_cast<int32_t>(p), static_cast<int32_t>(row[2]), static_cast<int32_t>(row[3]),
                                 static_cast<int8_t>(row[1]), /*queued=*/true};
        }
    }

    int64_t size() const { return static_cast<int64_t>(place_.size()); }
    int64_t index(int64_t p) const { return members_[p]; }
    const Spot& operator[](int64_t p) const { return spots_[place_[p]]; }

    void prefetch(int64_t p) const {
#ifdef __GNUC__
        __builtin_prefetch(&spots_[place_[p]]);
#endif
    }

    void drop(int64_t p) { spots_[place_[p]].queued = false; }

    // Takes a peak out of the queue, into a graph.
    void join(int64_t p) {
        Spot& spot = spots_[place_[p]];
        spot.queued = false;
        int32_t& head = joined_[bins_.bucket(0, spot.k, bins_.index(spot.y), bins_.index(spot.x))];
        next_[place_[p]] = head;
        head = place_[p];
    }

    // Whether a peak in a graph, of the type of this one, lies within reach. Peaks in graphs are few: looking for them
    // when another graph is to be opened takes less time than marking the neighbourhood of each of them.
    bool is_near_joined(const Spot& spot, double reach) const {
        const Window window(bins_, spot.x, spot.y, reach);
        for (int64_t row = window.first_row; row <= window.last_row; ++row) {
            for (int64_t column = window.first_column; column <= window.last_column; ++column) {
                for (int32_t i = joined_[bins_.bucket(0, spot.k, row, column)]; i >= 0; i = next_[i]) {
                    const double squared = squared_norm(static_cast<double>(spots_[i].x - spot.x),
                                                        static_cast<double>(spots_[i].y - spot.y));
                    if (spots_[i].k == spot.k && squared <= reach * reach) {
                        return true;
                    }
                }
            }
        }
        return false;
    }

    // Calls visit(spot, squared distance, whether it is of type k) for peaks around a point: all of type k within
    // reach, and some others. `visit` should handle these without a branch, which could not be predicted.
    template <typename Visit>
    void around(int64_t k, double at_x, double at_y, double reach, Visit visit) const {
        const Window window(bins_, at_x, at_y, reach);
        const int64_t buckets = static_cast<int64_t>(bins_.buckets), width = window.last_column - window.first_column;
        for (int64_t row = window.first_row; row <= window.last_row; ++row) {
            // The bins of a row are neighbouring buckets, the first after the last: one run of peaks, seldom two.
            const int64_t first = bins_.bucket(0, k, row, window.first_column), end = first + width + 1;
            visit_run(k, at_x, at_y, first, std::min(end, buckets), visit);
            if (end > buckets) {
                visit_run(k, at_x, at_y, 0, std::min(end - buckets, buckets), visit);
            }
        }
    }

  private:
    // Calls visit(spot, squared distance, whether it is of type k) for the peaks of buckets first .. end - 1.
    template <typename Visit>
    void visit_run(int64_t k, double at_x, double at_y, int64_t first, int64_t end, Visit visit) const {
        for (int64_t i = first_[first]; i < first_[end]; ++i) {
            visit(spots_[i], squared_norm(spots_[i].x - at_x, spots_[i].y - at_y), spots_[i].k == k);
        }
    }

    const int32_t* members_;
    Bins bins_;
    std::vector<Spot> spots_;     // by bucket, in each in the order of the queue
    std::vector<int32_t> place_;  // of each peak, in spots_
    std::vector<int32_t> first_;  // of each bucket, in spots_
    // Peaks in graphs, as places in spots_: the first one of each bucket, and for each one the next in its bucket.
    // -1: there is none.
    std::vector<int32_t> joined_, next_;
};

// The partner of type l, -1 if there is none; displacements [P,4,2].
template <typename T>
int64_t partner(const Queue& queue, const T* displacements, int64_t source, int l, const Radii& radii) {
    const Queue::Spot& spot = queue[source];
    // As doubles, which hold every displacement exactly.
    const T* by = displacements + 2 * ((kKeypoints - 1) * queue.index(source) + other_index(spot.k, l));
    Nearest nearest;
    queue.around(l, spot.x + static_cast<double>(by[0]), spot.y + static_cast<double>(by[1]), radii.match,
                 [&](const Queue::Spot& other, double squared, bool same) {
                     if (same & other.queued & (squared <= radii.match * radii.match)) {
                         nearest.offer(squared, other.peak);
                     }
                 });
    return nearest.peak;
}

using Graph = std::array<int64_t, kKeypoints>;  // the peak of each keypoint, -1 = missing

// Graphs of one group, in the order in which they are opened.
template <typename T>
std::vector<Graph> group_queue(Queue& queue, const double* scores, const T* displacements, const Radii& radii,
                               int64_t hops) {
    std::vector<Graph> graphs;
    for (int64_t start = 0; start < queue.size(); ++start) {
        if (start + kAhead < queue.size()) {
            queue.prefetch(start + kAhead);
        }
        const Queue::Spot& spot = queue[start];
        if (!spot.queued) {
            continue;
        }
        queue.drop(start);
        if (queue.is_near_joined(spot, radii.reject)) {
            continue;
        }
        Graph graph;
        graph.fill(-1);
        const auto join = [&](int64_t p) {
            graph[queue[p].k] = p;
            queue.join(p);
        };
        join(start);
        // Partners of the start by falling score, of equal ones by ascending type.
        Graph joined;
        int count = 0;
        for (int l = 0; l < kKeypoints; ++l) {
            const int64_t found = graph[l] < 0 ? partner(queue, displacements, start, l, radii) : -1;
            if (found >= 0) {
                join(found);
                int place = count++;
                const double score = scores[queue.index(found)];
                for (; hops == 2 && place > 0 && scores[queue.index(joined[place - 1])] < score; --place) {
                    joined[place] = joined[place - 1];
                }
                joined[place] = found;
            }
        }
        for (int l = 0; hops == 2 && l < kKeypoints; ++l) {
            for (int j = 0; j < count && graph[l] < 0; ++j) {
                const int64_t found = partner(queue, displacements, joined[j], l, radii);
                if (found >= 0) {
                    join(found);
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

std::tuple<at::Tensor, at::Tensor> group_peaks(const at::Tensor& peaks, const at::Tensor& scores,
                                               const at::Tensor& displacements, double match_radius,
                                               double reject_radius, int64_t hops) {
    check_grouping(peaks, scores, displacements, match_radius, reject_radius, hops);
    const at::Tensor rows = peaks.contiguous();
    const int64_t count = rows.size(0), *peak = rows.const_data_ptr<int64_t>();
    const int64_t limit[4] = {std::numeric_limits<int64_t>::max(), kKeypoints, kMostPixels, kMostPixels};
    for (int64_t i = 0; i < rows.numel(); ++i) {
        TORCH_CHECK_VALUE(peak[i] >= 0 && peak[i] < limit[i % 4],
                          "peaks: expected image, keypoint below 5, and y, x below 2^31, none negative, got ", peak[i],
                          " in column ", i % 4);
    }
    // As doubles, which hold every score exactly.
    const at::Tensor values = scores.to(at::kDouble).contiguous(), by = displacements.contiguous();
    const Radii radii{match_radius, reject_radius};

    std::vector<int32_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    const auto earlier = [&](int32_t a, int32_t b) { return peak[4 * a] < peak[4 * b]; };
    if (!std::is_sorted(order.begin(), order.end(), earlier)) {
        std::stable_sort(order.begin(), order.end(), earlier);
    }
    std::vector<int64_t> first;  // of each group, in the order
    for (int64_t i = 0; i < count; ++i) {
        if (i == 0 || earlier(order[i - 1], order[i])) {
            first.push_back(i);
        }
    }
    const int64_t groups = static_cast<int64_t>(first.size());
    first.push_back(count);
    std::vector<std::vector<Graph>> graphs_of_groups(groups);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, by.scalar_type(), "group_peaks", [&] {
        each_task(groups, [&](int64_t g) {
            Queue queue(peak, order.data() + first[g], first[g + 1] - first[g], radii);
            graphs_of_groups[g] =
                group_queue(queue, values.const_data_ptr<double>(), by.const_data_ptr<scalar_t>(), radii, hops);
        });
    });

    int64_t total = 0;
    for (const auto& graphs : graphs_of_groups) {
        total += static_cast<int64_t>(graphs.size());
    }
    const at::Tensor result = at::empty({total, kKeypoints, 3}, values.options());
    at::Tensor image = at::empty({total}, rows.options());
    double* to = result.mutable_data_ptr<double>();
    int64_t* to_image = image.mutable_data_ptr<int64_t>();
    for (int64_t g = 0; g < groups; ++g) {
        for (const Graph& graph : graphs_of_groups[g]) {
            *to_image++ = peak[4 * order[first[g]]];
            for (int64_t p : graph) {
                *to++ = p < 0 ? 0 : static_cast<double>(peak[4 * p + 3]);
                *to++ = p < 0 ? 0 : static_cast<double>(peak[4 * p + 2]);
                *to++ = p < 0 ? 0 : values.const_data_ptr<double>()[p];
            }
        }
    }
    return {result.to(c10::promoteTypes(scores.scalar_type(), at::kFloat)), image};
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CPU, m) {
    m.impl("group_peaks", &kg::group_peaks);
}
