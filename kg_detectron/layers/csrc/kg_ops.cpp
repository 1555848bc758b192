// Schemas of the operators. Their meaning is kg_detectron/layers/reference.py; the typed wrappers are layers/ops.py.
#include <torch/library.h>

TORCH_LIBRARY(kg_detectron, m) {
    m.def("hough_vote(Tensor heatmap, Tensor offsets, float radius) -> Tensor");
    m.def("smooth_votes(Tensor votes, float sigma) -> Tensor");
    m.def("find_peaks(Tensor[] maps, float threshold) -> (Tensor peaks, Tensor scores)");
    m.def("gather_displacements(Tensor peaks, Tensor[] group_offsets) -> Tensor");
    m.def(
        "group_peaks(Tensor peaks, Tensor scores, Tensor displacements, float match_radius, float reject_radius, "
        "int hops) -> (Tensor graphs, Tensor image)");
    m.def("graphs_to_boxes(Tensor graphs, bool corner_and_centre) -> (Tensor boxes, Tensor scores, Tensor graph)");
    m.def(
        "render_targets(Tensor boxes, Tensor image, SymInt images, SymInt height, SymInt width, float stride, "
        "float radius, float min_side) -> (Tensor heatmap, Tensor single_offset, Tensor group_offset)");
    m.def("convolve_resized(Tensor products, Tensor before, Tensor after, Tensor places, SymInt pixels) -> Tensor");
    m.def(
        "convolve_resized_backward(Tensor gradient, SymInt products, Tensor before, Tensor after, Tensor places) "
        "-> Tensor");
}
