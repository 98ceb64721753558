// Work recorded once and run many times: on a GPU a CUDA graph, which starts thousands of kernels in one go.
#pragma once

#include <functional>
#include <memory>

#include "core/memory.h"

namespace headwater::cuda {

/// What `body` put into the compute stream. Everything that the kernels are told by value stays as it was then; what
/// changes from run to run must lie in device memory. Tensors that `body` allocates come from a pool of the graph's own,
/// so that their addresses stay theirs.
class Graph {
 public:
  /// Calls `body` once; nothing runs yet. Throws std::logic_error if it waits for the device or copies to or from the host.
  Graph(Device device, const std::function<void()>& body);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch() const;

 private:
  std::shared_ptr<MemoryPool> pool_;
  void* handle_ = nullptr;
};

}  // namespace headwater::cuda
