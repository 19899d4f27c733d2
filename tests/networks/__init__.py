"""Small networks of the families of others, as files of one's own."""
