"""The engine: which sequences run (sequence, scheduler: no torch), one step on the device (runner, sampler), the loop (core, process)."""
