"""Code that several kernels share: launching, launch configurations and dropout."""
