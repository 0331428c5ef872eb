"""Code shared by several kernels: launching, launch configurations and dropout."""
