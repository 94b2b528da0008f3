"""Many processes on one study, faults while they work, and an audit of all that they were told."""
