"""Tests of the sandbox: as strict as the API that it simulates, and with the same faults."""
