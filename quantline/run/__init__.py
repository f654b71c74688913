"""Running a stage: parameters, run events, atomic outputs, failures with a name, measuring processes."""
