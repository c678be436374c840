// A goroutine a connection, as net/http does it.
package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
)

const httpAnswer = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\n" +
	"Connection: close\r\n\r\nhello\n"

var held []net.Conn

func answer(connection net.Conn, work string) {
	defer connection.Close()
	if work == "close" {
		return
	}
	question := make([]byte, 4096)
	have := 0
	for {
		n, err := connection.Read(question[have:])
		if err != nil {
			return
		}
		have += n
		if work == "echo" {
			connection.Write(question[:have])
			return
		}
		if bytes.Contains(question[:have], []byte("\r\n\r\n")) {
			connection.Write([]byte(httpAnswer))
			return
		}
	}
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: server close|echo|http|hold")
		os.Exit(2)
	}
	work := os.Args[1]
	// The backlog is net.core.somaxconn: Go asks the system.
	// Without keep-alive, which no other server sets: three setsockopt() less for each client.
	config := net.ListenConfig{KeepAlive: -1}
	listener, err := config.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	for {
		connection, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		if work == "hold" {
			// A goroutine each, waiting for the client, as a server that holds clients has.
			go func() { connection.Read(make([]byte, 1)) }()
			held = append(held, connection)
			continue
		}
		go answer(connection, work)
	}
}
