// Local maxima of the score maps (paper, section 2.1, step 2): what a peak is, the same on both devices.
#pragma once

#include <limits>

#include "host_device.h"

namespace kg {

// Whether a pixel of this score is a peak if no neighbour hides it: it is finite and above the threshold.
// No condition short-circuits, so that compilers vectorise.
template <typename T>
KG_HOST_DEVICE bool is_candidate(T score, T threshold) {
    return (score > threshold) & (score <= std::numeric_limits<T>::max());
}

// Whether a neighbour hides a candidate: it is finite and above it.
template <typename T>
KG_HOST_DEVICE bool hides(T neighbour, T score) {
    return (neighbour > score) & (neighbour <= std::numeric_limits<T>::max());
}

}  // namespace kg
