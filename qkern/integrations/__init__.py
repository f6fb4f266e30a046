"""What joins qkern to other libraries, a module each, imported only where it is asked for."""
