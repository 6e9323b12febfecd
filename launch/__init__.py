"""Start runs: launchers, environment set-up, planning, preflight checks and the quickstart."""
