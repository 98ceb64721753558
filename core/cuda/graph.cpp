#include "core/cuda/graph.h"

#include "core/cuda/runtime.h"

namespace headwater::cuda {

Graph::Graph(Device device, const std::function<void()>& body) : pool_(make_memory_pool(device)) {
  const UseMemoryPool use(pool_);
  begin_recording();
  try {
    body();
  } catch (...) {
    release_recording(end_recording());
    throw;
  }
  handle_ = end_recording();
}

Graph::~Graph() {
  release_recording(handle_);
}

void Graph::launch() const {
  launch_recording(handle_);
}

}  // namespace headwater::cuda
