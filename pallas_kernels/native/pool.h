// A small thread pool for kernels that take microseconds.
//
// Between two kernels of one decode step lie a few microseconds: waking a sleeping thread costs
// more than that, so workers spin for a moment before they sleep. run() gives every participant
// the same function; barrier() separates its phases. One job at a time: a caller that finds the
// pool busy runs alone, so concurrent XLA executions never wait for each other.
#pragma once
#include <functional>

namespace qjax {

struct Team {
  int index, size;
  void barrier() const;  // every member of the team must reach it
};

int num_threads();
void set_num_threads(int n);
void run(const std::function<void(const Team&)>& job);

}  // namespace qjax
