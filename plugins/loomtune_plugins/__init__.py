"""The built-in plugins, one folder an axis. They come through the same door as anybody's."""
