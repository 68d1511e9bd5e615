"""The sparse engine on the CPU, and the dense engines that it is compared with."""
