"""The bus: one contract (`base`), a durable local log (`local`) and Kafka (`kafka`)."""
