#include "core/base/job.h"

#include "core/base/error.h"

namespace martlet {

void JobContext::check() const {
  if (cancelled()) throw Error(code::kAborted, "The job was cancelled.");
}

}  // namespace martlet
