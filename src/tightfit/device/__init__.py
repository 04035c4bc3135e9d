"""What a device costs: seconds of an op (`cost`), bytes of a block (`allocator`). No torch here."""
