"""Tools about the machine: doctor, benchmarks, kernel reports and tuning."""
