"""Assets, checks, jobs, schedules and resources: each module here is loaded by itself."""
