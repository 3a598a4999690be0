"""What can be told of a job and its leads afterwards; and what the API offers."""
