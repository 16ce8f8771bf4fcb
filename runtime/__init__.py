"""What runs between the sampler and the compiled pieces: which step this is, what is cached, what is decided.

trajectory.py  runs of the sampler, marked by the caller or inferred from the calls
clock.py       which step of a marked trajectory a call belongs to
schedule.py    a scheduler's timesteps, and where among them a call is
streams.py     which stream of a trajectory a call belongs to
conditioning.py  the conditioning of a stream, and which of its tensors are data
inputs.py      which inputs of a denoiser are latent, timestep and conditioning
tensors.py     identity, version and one read of the device
cache.py       slots of one graph's occurrence, with stamps
measure.py     how much what guards read has changed; spectral.py: SeaCache's filter of it
decide.py      the decision machine: a pure function
session.py     the state of one thread: its trajectory and its call
dispatch.py    decisions -> pieces -> call
stats.py       what was counted
"""
