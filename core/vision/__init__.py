"""Pictures: from a file's bytes to the hidden states that stand for them in a prompt.

Owns which files are pictures, their pixels, the vision tower, and the ids and positions of image tokens.
Never knows conversations, and reads no weight before the first picture.

Public names: count_images, decode_with_images, encode_png, Grid, Images, is_image, MAX_NBYTES, Picture,
PlacedPicture, read_picture_file, Thumbnail, with_pictures.
"""
