"""Methods that know the trigger: they are given triggered copies of their clean images."""
