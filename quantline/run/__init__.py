"""Running a stage: parameters, events, atomic outputs, named failures, child processes."""
