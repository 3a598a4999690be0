"""What Ray carries; nothing outside imports it before it is asked for, since Ray comes with an extra."""
