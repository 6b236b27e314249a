/* The speed of librdkafka in C: produce the lines of a file to a topic, print the seconds from the first
   acknowledgement to the last. Linked against the librdkafka of confluent-kafka's wheel, whose header the wheel leaves
   out: hence the declarations.

   Usage: produce FILE TOPIC [setting value]...                                                                       */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct rd_kafka_s rd_kafka_t;
typedef struct rd_kafka_conf_s rd_kafka_conf_t;
typedef struct rd_kafka_topic_s rd_kafka_topic_t;
typedef struct rd_kafka_message_s {
    int err;
} rd_kafka_message_t; /* only its first field is used here */

enum { RD_KAFKA_PRODUCER = 0, CONF_OK = 0, QUEUE_FULL = -184 };

rd_kafka_conf_t *rd_kafka_conf_new(void);
int rd_kafka_conf_set(rd_kafka_conf_t *, const char *, const char *, char *, size_t);
void rd_kafka_conf_set_dr_msg_cb(rd_kafka_conf_t *, void (*)(rd_kafka_t *, const rd_kafka_message_t *, void *));
rd_kafka_t *rd_kafka_new(int, rd_kafka_conf_t *, char *, size_t);
rd_kafka_topic_t *rd_kafka_topic_new(rd_kafka_t *, const char *, void *);
int rd_kafka_produce(rd_kafka_topic_t *, int, int, void *, size_t, const void *, size_t, void *);
int rd_kafka_last_error(void);
const char *rd_kafka_err2str(int);
int rd_kafka_poll(rd_kafka_t *, int);
int rd_kafka_flush(rd_kafka_t *, int);
void rd_kafka_topic_destroy(rd_kafka_topic_t *);
void rd_kafka_destroy(rd_kafka_t *);

static long delivered, failed;

static void report(rd_kafka_t *producer, const rd_kafka_message_t *message, void *opaque) {
    (void)producer, (void)opaque;
    if (message->err)
        failed++;
    else
        delivered++;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

int main(int count, char **arguments) {
    char error[512];
    FILE *file = count < 3 ? NULL : fopen(arguments[1], "rb");
    if (!file) {
        fprintf(stderr, "usage: produce FILE TOPIC [setting value]...\n");
        return 2;
    }
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    char *lines = malloc(size);
    if (!lines || fread(lines, 1, size, file) != size) {
        fprintf(stderr, "%s cannot be read\n", arguments[1]);
        return 2;
    }
    fclose(file);

    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    for (int i = 3; i + 1 < count; i += 2) {
        if (rd_kafka_conf_set(conf, arguments[i], arguments[i + 1], error, sizeof error) != CONF_OK) {
            fprintf(stderr, "%s\n", error);
            return 2;
        }
    }
    rd_kafka_conf_set_dr_msg_cb(conf, report);
    rd_kafka_t *producer = rd_kafka_new(RD_KAFKA_PRODUCER, conf, error, sizeof error);
    if (!producer) {
        fprintf(stderr, "%s\n", error);
        return 2;
    }
    rd_kafka_topic_t *topic = rd_kafka_topic_new(producer, arguments[2], NULL);
    long sent = 0;
    double began = 0;
    for (char *line = lines, *end = lines + size; line < end;) {
        char *stop = memchr(line, '\n', (size_t)(end - line));
        if (!stop)
            stop = end;
        while (rd_kafka_produce(topic, -1, 0, line, (size_t)(stop - line), NULL, 0, NULL) != 0) {
            if (rd_kafka_last_error() != QUEUE_FULL) {
                fprintf(stderr, "%s\n", rd_kafka_err2str(rd_kafka_last_error()));
                return 1;
            }
            rd_kafka_poll(producer, 100);
        }
        if (++sent == 1) {
            rd_kafka_flush(producer, 120000);
            began = now();
        } else if (sent % 1000 == 0) {
            rd_kafka_poll(producer, 0);
        }
        line = stop + 1;
    }
    rd_kafka_flush(producer, 120000);
    double seconds = now() - began;
    rd_kafka_topic_destroy(topic);
    rd_kafka_destroy(producer);
    if (failed || delivered != sent) {
        fprintf(stderr, "%ld sent, %ld delivered, %ld failed\n", sent, delivered, failed);
        return 1;
    }
    printf("%.6f\n", seconds);
    return 0;
}
