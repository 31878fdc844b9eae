"""Dense classifiers from pretrained ConvNeXt V2 encoders; imports fcmae, never the reverse."""
