"""The worker: loads a pipeline and executes ticks, in a thread of the engine's process or in a process of its own."""
