"""The sparse encoder: one traversal of timm's ConvNeXt V2 over interchangeable layouts of the visible positions."""
