"""Image classification: folders, DomainNet, preprocessing and loaders."""
